//! Whose a loaded program is, by its name.

use std::collections::HashMap;

/// How the names of well-known programs begin, and whose they are. Names have 15 letters.
const OWNERS: &[(&str, &str)] = &[
    ("cil_", "Cilium"),
    ("calico_", "Calico"),
    ("cali_", "Calico"),
    ("sd_", "systemd"),
];
const OWN: &str = "redirect_";

/// The names of all loaded programs, by the kernel's numbers.
pub(super) struct Names(HashMap<u32, String>);

impl Names {
    pub(super) fn read() -> Self {
        let named = aya::programs::loaded_programs().flatten().map(|program| {
            let name = program.name_as_str().filter(|name| !name.is_empty());
            let nameless = || format!("program {}", program.id());
            (program.id(), name.map_or_else(nameless, str::to_owned))
        });
        Self(named.collect())
    }

    pub(super) fn is_own(&self, id: u32) -> bool {
        self.0.get(&id).is_some_and(|name| name.starts_with(OWN))
    }

    /// Those of these programs that are somebody else's, in words. One that has gone meanwhile is left out.
    pub(super) fn others(&self, ids: &[u32]) -> Vec<String> {
        let names = ids.iter().filter_map(|id| self.0.get(id));
        let others = names.filter(|name| !name.starts_with(OWN));
        others.map(|name| describe(name)).collect()
    }
}

fn describe(name: &str) -> String {
    OWNERS
        .iter()
        .find(|(start, _)| name.starts_with(start))
        .map_or_else(|| name.to_owned(), |(_, owner)| format!("{name} ({owner})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_known_programs_are_told_by_name() {
        assert_eq!(describe("cil_sock4_conne"), "cil_sock4_conne (Cilium)");
        assert_eq!(describe("calico_connect_"), "calico_connect_ (Calico)");
        assert_eq!(describe("mine"), "mine");
    }

    #[test]
    fn own_programs_are_not_among_the_others() {
        let loaded = [(1, "redirect_entry"), (2, "cil_a"), (3, "mine")];
        let names = Names(loaded.map(|(id, name)| (id, name.to_owned())).into());
        assert_eq!(names.others(&[3, 1, 2, 4]), ["mine", "cil_a (Cilium)"]);
        assert_eq!([1, 2, 4].map(|id| names.is_own(id)), [true, false, false]);
    }
}

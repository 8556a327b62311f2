//! What the guest's console tells: how far the job is, and whether the kernel is still well.

use super::job::Mark;

/// Lines that tell of one.
const DISASTERS: &[(&str, Disaster)] = &[
    ("Kernel panic - not syncing", Disaster::Panic),
    ("watchdog: BUG: soft lockup", Disaster::Lockup),
    ("Watchdog detected hard LOCKUP", Disaster::Lockup),
    ("rcu: INFO: rcu_", Disaster::Stall),
    ("BUG: ", Disaster::Oops),
    ("Oops: ", Disaster::Oops),
    ("general protection fault", Disaster::Oops),
    ("WARNING: ", Disaster::Warning),
];

/// What may become of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disaster {
    Panic,
    Lockup,
    /// A CPU that no RCU grace period gets past; with an emulator also a sign of a crowded machine.
    Stall,
    Oops,
    /// The kernel found itself in a state it should not be in.
    Warning,
}

impl Disaster {
    /// Whether nothing that the guest does counts any more.
    pub fn is_fatal(self) -> bool {
        !matches!(self, Self::Stall | Self::Warning)
    }
}

/// What the console has told so far.
#[derive(Debug, Default)]
pub struct Console {
    /// Marks in the order they came.
    pub marks: Vec<Mark>,
    /// The first fatal disaster and its line, or else the first of all. A panic that follows an oops is the same event.
    pub disaster: Option<(Disaster, String)>,
    /// The last lines, for when a guest ends without a word.
    pub tail: Vec<String>,
}

const TAIL: usize = 40;

impl Console {
    /// Takes one line; true if it is a new mark.
    pub fn read(&mut self, line: &str) -> bool {
        let line = line.trim_end();
        if let Some(mark) = Mark::read(line) {
            self.marks.push(mark);
            return true;
        }
        if self.tail.len() == TAIL {
            self.tail.remove(0);
        }
        self.tail.push(line.to_owned());
        let told = DISASTERS.iter().find(|(text, _)| line.contains(text));
        if let Some((_, told)) = told
            && (self.disaster.is_none() || told.is_fatal() && self.fatal().is_none())
        {
            self.disaster = Some((*told, line.to_owned()));
        }
        false
    }

    /// What ended the kernel, and its line.
    pub fn fatal(&self) -> Option<&(Disaster, String)> {
        let disaster = self.disaster.as_ref();
        disaster.filter(|(disaster, _)| disaster.is_fatal())
    }

    /// Whether the job came to its end.
    pub fn is_done(&self) -> bool {
        self.marks.contains(&Mark::Done)
    }

    /// How the command of that name ended.
    pub fn status(&self, name: &str) -> Option<i32> {
        self.marks.iter().find_map(|mark| match mark {
            Mark::End(ended, status) if ended == name => Some(*status),
            _ => None,
        })
    }

    /// Whether the job has begun.
    pub fn is_started(&self) -> bool {
        self.marks.contains(&Mark::Started)
    }

    /// Whether the command of that name has begun.
    pub fn has_begun(&self, name: &str) -> bool {
        self.marks.contains(&Mark::Begin(name.to_owned()))
    }

    /// What should not be, as the guest's first process told it last.
    fn trouble(&self) -> Option<&str> {
        self.marks.iter().rev().find_map(|mark| match mark {
            Mark::Trouble(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// Why a guest ended that has said nothing of it: what its first process told, or else its last lines.
    pub fn last_words(&self) -> String {
        match self.trouble() {
            Some(trouble) => trouble.to_owned(),
            None => format!("ended without a word: {}", self.tail.join("\n")),
        }
    }

    /// The command that has begun and not ended.
    pub fn running(&self) -> Option<&str> {
        let begun = self.marks.iter().rev().find_map(|mark| match mark {
            Mark::Begin(name) => Some(name.as_str()),
            _ => None,
        })?;
        self.status(begun).is_none().then_some(begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(lines: &[&str]) -> Console {
        let mut console = Console::default();
        for line in lines {
            console.read(line);
        }
        console
    }

    #[test]
    fn first_disaster_counts_and_its_panic_does_not_hide_it() {
        let told = console(&[
            "[    1.000] redirect-vm: started",
            "[    3.000] redirect-vm: begin load",
            "[    4.000] BUG: kernel NULL pointer dereference, address: 0000000000000008",
            "[    4.001] Kernel panic - not syncing: Fatal exception",
        ]);
        let (disaster, line) = told.disaster.clone().unwrap();
        assert_eq!(disaster, Disaster::Oops);
        assert!(line.contains("NULL pointer"), "{line}");
        assert_eq!(told.running(), Some("load"));
    }

    #[test]
    fn warning_does_not_hide_the_panic_after_it() {
        let warning = "[    4.000] WARNING: CPU: 0 PID: 1 at kernel/bpf/core.c:1";
        let told = console(&[warning]);
        assert!(told.fatal().is_none() && told.disaster.is_some());
        let told = console(&[warning, "[    5.0] Kernel panic - not syncing: oops"]);
        assert_eq!(told.fatal().unwrap().0, Disaster::Panic);
    }

    #[test]
    fn lockup_and_panic_are_told_apart_from_ordinary_lines() {
        let lockup = "[   30.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [actor:99]";
        assert_eq!(console(&[lockup]).disaster.unwrap().0, Disaster::Lockup);
        let panic = "[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs";
        assert_eq!(console(&[panic]).disaster.unwrap().0, Disaster::Panic);
        assert_eq!(
            console(&["[ 1.0] veth0: entered promiscuous mode"]).disaster,
            None
        );
    }

    #[test]
    fn ended_command_has_a_status_and_is_not_running() {
        let told = console(&["redirect-vm: begin load", "redirect-vm: end load 1"]);
        assert_eq!((told.status("load"), told.running()), (Some(1), None));
        assert_eq!(told.status("other"), None);
    }
}

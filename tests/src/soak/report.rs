//! What a run came to.

use std::{
    collections::BTreeMap,
    fmt::{Display, Formatter, Result},
    time::Duration,
};

use super::leaks::Counts;

/// So many violations end a run, and are shown.
pub const ENOUGH: usize = 12;

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Where everything random came from.
    pub seed: u64,
    /// The arguments of `cargo xtask soak` that make the same.
    pub command: String,
    /// Rounds that have ended.
    pub rounds: u64,
    /// Connections that were made.
    pub connections: u64,
    /// The same by what was done with them.
    pub manners: BTreeMap<&'static str, u64>,
    /// The same by who answered, or what error came.
    pub outcomes: BTreeMap<String, u64>,
    /// Captured connections that found the proxy away.
    pub excused: u64,
    /// Connections that were held over at least one round, each counted once a round.
    pub asked: u64,
    /// The most connections that were held at once.
    pub held: usize,
    /// What happened to the pods.
    pub events: BTreeMap<&'static str, u64>,
    /// How often the counters were compared.
    pub counted: u64,
    /// How often they had to be exact.
    pub exact: u64,
    /// How often those had to be that no inbound connection is counted by.
    pub exact_outbound: u64,
    /// Kernel objects when all pods are attached.
    pub objects: Option<Counts>,
    /// Sockets with a storage at the end, when only listeners were left.
    pub storages: usize,
    /// Kernel memory of the machine, in bytes, and connections made by then.
    pub memory: Vec<(u64, u64)>,
    /// By how much that grew, in bytes.
    pub growth: i64,
    /// How long it took.
    pub took: Duration,
    /// Everything that happened to the pods, in order.
    pub schedule: Vec<String>,
    /// What should not have been, each with the round.
    pub violations: Vec<String>,
}

impl Report {
    /// Whether all was as it should be.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// Whether so much is wrong that more would tell nothing.
    pub fn is_enough(&self) -> bool {
        self.violations.len() >= ENOUGH
    }

    /// Something is wrong.
    pub fn wrong(&mut self, pod: usize, what: &str) {
        if !self.is_enough() {
            let round = self.rounds;
            self.violations
                .push(format!("round {round}, pod {pod}: {what}"));
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        fn list<K: Display, V: Display>(map: &BTreeMap<K, V>) -> String {
            let items: Vec<String> = map.iter().map(|(key, n)| format!("{key} {n}")).collect();
            items.join(", ")
        }
        let seconds = self.took.as_secs();
        writeln!(f, "seed           {}", self.seed)?;
        writeln!(f, "rounds         {} in {seconds} s", self.rounds)?;
        writeln!(
            f,
            "connections    {}: {}",
            self.connections,
            list(&self.manners)
        )?;
        writeln!(f, "answered by    {}", list(&self.outcomes))?;
        writeln!(f, "proxy away     {}", self.excused)?;
        writeln!(
            f,
            "held           up to {}, asked {} times",
            self.held, self.asked
        )?;
        writeln!(f, "events         {}", list(&self.events))?;
        writeln!(
            f,
            "counters       compared {} times; exact outbound {}, both ways {}",
            self.counted, self.exact_outbound, self.exact
        )?;
        if let Some(objects) = &self.objects {
            writeln!(
                f,
                "attached       {} links, {} programs, {} maps, {} pins",
                objects.links, objects.programs, objects.maps, objects.pins
            )?;
        }
        writeln!(
            f,
            "storages       {} at the end, of listeners",
            self.storages
        )?;
        writeln!(f, "kernel memory  {:+} KiB", self.growth / 1024)?;
        if self.is_clean() {
            return write!(f, "violations     none");
        }
        writeln!(f, "violations     {}", self.violations.len())?;
        for violation in &self.violations {
            writeln!(f, "  {violation}")?;
        }
        writeln!(f, "what happened to the pods:")?;
        for line in &self.schedule {
            writeln!(f, "  {line}")?;
        }
        write!(f, "the same again: {}", self.command)
    }
}

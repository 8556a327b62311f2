//! What is looked at while nobody connects: between rounds, and at the end.

use std::collections::BTreeMap;

use super::{
    ATTACH, Soak,
    cast::{Cast, Server},
    draw::Kind,
    history::State,
    leaks::{growth, kernel_memory, settle, storages},
    policy::Caller,
};
use crate::{
    bpffs, loader,
    play::now,
    protocol::{Answer, Request},
};

impl Soak<'_> {
    /// Looks at everything while nobody connects.
    pub(super) fn rest(&mut self) {
        for index in 0..self.casts.len() {
            self.ask_held(index);
        }
        let flows = settle(|| {
            let flows = bpffs::flows().unwrap_or_default();
            flows
                .iter()
                .map(|flow| format!("left in FLOWS: {flow:?}"))
                .collect()
        });
        for what in flows {
            self.report.wrong(0, &what);
        }
        for index in 0..self.casts.len() {
            let cast = &self.casts[index];
            for what in settle(|| cast.stray_descriptors()) {
                self.report.wrong(index, &what);
            }
            self.count(index);
        }
        match self.kernel.look(&self.casts) {
            Ok(counts) => {
                let attached = self
                    .casts
                    .iter()
                    .all(|cast| cast.is_attached() == Some(true));
                if attached && counts.is_some() {
                    self.report.objects = counts;
                }
            }
            Err(why) => self.report.wrong(0, &why),
        }
        let measured = (kernel_memory(), self.report.connections);
        self.report.memory.push(measured);
        let time = now();
        for cast in &mut self.casts {
            cast.history.forget_before(time);
        }
    }

    fn ask_held(&mut self, index: usize) {
        let cast = &mut self.casts[index];
        for holder in cast.holders.values_mut() {
            holder.order(&Request::AskHeld);
        }
        for caller in Caller::ALL {
            let cast = &mut self.casts[index];
            let Answer::Held(all) = cast.holders[&caller].receive() else {
                panic!("not what the connections held say");
            };
            let life = cast.history.settled().and_then(State::life);
            let mut wrong = Vec::new();
            for held in all {
                let key = (caller, held.number);
                // What is not in the list was judged when it was made.
                let Some(note) = cast.held.get(&key).copied() else {
                    continue;
                };
                self.report.asked += 1;
                match held.says {
                    Err(error) => {
                        cast.held.remove(&key);
                        let died = match note.server {
                            Server::Proxy(number) => cast.history.died_by(number, now()),
                            Server::App | Server::Service => false,
                        };
                        self.tallies[index].broken();
                        if !died {
                            wrong.push(format!("held by {caller:?}, {note:?}: {error}"));
                        }
                    }
                    Ok(ends) => {
                        let direct = !matches!(note.server, Server::Proxy(_));
                        let renamed = note.life.is_some() && note.life == life && ends != note.ends;
                        if renamed || direct && ends.peer != note.ends.peer {
                            wrong.push(format!("held by {caller:?}, {note:?}: now {ends:?}"));
                        }
                    }
                }
            }
            for what in wrong {
                self.report.wrong(index, &what);
            }
        }
    }

    /// Compares the counters with the connections made since the last time.
    fn count(&mut self, index: usize) {
        let cast = &mut self.casts[index];
        self.tallies[index].retransmitted(cast.retransmitted());
        let Some(State::Attached { life, .. }) = cast.history.settled() else {
            return;
        };
        let next = self.tallies[index].next();
        let tally = std::mem::replace(&mut self.tallies[index], next);
        let counted = match counters(cast) {
            Ok(counted) => counted,
            Err(why) => return self.report.wrong(index, &why),
        };
        let before = self.counters[index].replace((life, counted.clone()));
        let before = match before {
            Some((then, before)) if then == life => before,
            // A new attachment begins with nothing; one whose beginning was not seen is looked at next time.
            _ if cast.history.is_fresh() => BTreeMap::new(),
            _ => return,
        };
        let mut since = counted;
        for (label, before) in &before {
            let now = since.entry(label.clone()).or_default();
            *now = now.saturating_sub(*before);
        }
        self.report.counted += 1;
        self.report.exact += u64::from(tally.is_exact(life));
        self.report.exact_outbound += u64::from(tally.is_exact_outbound(life));
        for what in tally.differences(life, &since) {
            self.report.wrong(index, &what);
        }
    }

    /// Ends all, and looks for what is left.
    pub(super) fn end(&mut self) {
        for event in self.everywhere(ATTACH) {
            self.happen(event);
        }
        for (cast, tally) in self.casts.iter_mut().zip(&mut self.tallies) {
            cast.retire();
            let held = std::mem::take(&mut cast.held);
            tally.released(held.len());
            for (caller, holder) in &mut cast.holders {
                let numbers = held.keys().filter(|key| key.0 == *caller);
                let release = Request::Release(numbers.map(|key| key.1).collect());
                assert!(matches!(holder.request(&release), Answer::Done));
            }
        }
        self.rest();
        for (index, cast) in self.casts.iter().enumerate() {
            for (name, actor) in cast.inside() {
                let stored = storages(actor);
                if stored > 0 {
                    let what = format!("{name} has {stored} sockets with a storage");
                    self.report.wrong(index, &what);
                }
            }
            let proxies = cast.proxies.iter().map(|generation| &generation.actor);
            self.report.storages += proxies.map(storages).sum::<usize>();
        }
        for event in self.everywhere(Kind::Detach { killed_us: None }) {
            self.happen(event);
        }
        let left = self.kernel.left();
        if !left.is_empty() {
            self.report
                .wrong(0, &format!("not freed by the kernel: {left:?}"));
        }
        let pins = bpffs::pins();
        if !pins.is_empty() {
            self.report.wrong(0, &format!("left pinned: {pins:?}"));
        }
        match growth(&self.report.memory) {
            Ok(grown) => self.report.growth = grown,
            Err(why) => self.report.wrong(0, &why),
        }
    }
}

/// A pod's counters, by rule.
fn counters(cast: &Cast) -> Result<BTreeMap<String, u64>, String> {
    let status = loader::status();
    let pods = status["pods"].as_array().unwrap();
    let cgroup = cast.pod.cgroup.path().to_str().unwrap();
    let pod = pods.iter().find(|pod| pod["cgroup"] == cgroup);
    let pod = pod.ok_or_else(|| format!("{cgroup} is not in the status: {status}"))?;
    Ok(serde_json::from_value(pod["connections"].clone()).unwrap())
}

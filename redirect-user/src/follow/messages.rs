//! Messages that aya-log has put together.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use redirect_common::log::Trouble;

/// A message of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Raw {
    pub(super) level: Level,
    /// None if the message does not begin with one.
    pub(super) netns_cookie: Option<u64>,
    pub(super) text: String,
}

/// The programs' messages, read from the ring buffer that all of them write to.
pub(super) struct Messages {
    logger: EbpfLogger<Arc<Collector>>,
    collector: Arc<Collector>,
}

impl Messages {
    /// By any loaded program that writes messages: the buffer is the same for all.
    pub(super) fn of_program(program_id: u32) -> Result<Self> {
        let collector = Arc::new(Collector::default());
        let logger = EbpfLogger::init_from_id_with_logger(program_id, Arc::clone(&collector))
            .context("finding the programs' messages")?;
        Ok(Self { logger, collector })
    }

    /// All that have come since the last call.
    pub(super) fn read(&mut self) -> Vec<Raw> {
        self.logger.flush();
        std::mem::take(&mut self.collector.lock())
    }
}

/// What aya-log hands over, until it is taken.
#[derive(Default)]
struct Collector(Mutex<Vec<Raw>>);

impl Collector {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Raw>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let (netns_cookie, text) = split(&record.args().to_string());
        self.lock().push(Raw {
            level: record.level(),
            netns_cookie,
            text: in_words(text),
        });
    }

    fn flush(&self) {}
}

/// The programs put `netns COOKIE: ` in front of every message, and write IPv4 destinations as
/// IPv4-mapped, so that the verifier has one kind of message to walk.
fn split(message: &str) -> (Option<u64>, String) {
    let message = message.replacen(" to ::ffff:", " to ", 1);
    let parts = message
        .strip_prefix("netns ")
        .and_then(|rest| rest.split_once(": "))
        .and_then(|(cookie, text)| Some((cookie.parse().ok()?, text)));
    match parts {
        Some((cookie, text)) => (Some(cookie), text.to_owned()),
        None => (None, message),
    }
}

/// Puts words for the number of a [`Trouble`] at the end. One of another build may be unknown here, and stays.
fn in_words(text: String) -> String {
    let known = text.rsplit_once("trouble ").and_then(|(about, number)| {
        let trouble = Trouble::ALL.get(number.parse::<usize>().ok()?)?;
        Some(format!("{about}{}", trouble.text()))
    });
    known.unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookie_is_taken_from_the_front() {
        assert_eq!(split("netns 42: a: b"), (Some(42), "a: b".to_owned()));
        assert_eq!(
            split("netns 42: c to ::ffff:10.0.0.1 b").1,
            "c to 10.0.0.1 b"
        );
        for other in ["a: b", "netns x: b", "netns 42"] {
            assert_eq!(split(other), (None, other.to_owned()));
        }
    }

    #[test]
    fn trouble_is_told_in_words() {
        for trouble in Trouble::ALL {
            let text = format!("connection to ::1 port 80: trouble {}", trouble as u32);
            let words = format!("connection to ::1 port 80: {}", trouble.text());
            assert_eq!(in_words(text), words);
        }
        for other in ["a", "a: trouble", "a: trouble 6", "a: trouble x"] {
            assert_eq!(in_words(other.to_owned()), other);
        }
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{config, text};

    proptest! {
        #![proptest_config(config(1))]

        #[test]
        fn any_message_is_split(message in prop_oneof![text(), "(netns )?[0-9]{0,22}(: )?( to ::ffff:)?[a-z: ]{0,9}(trouble [0-9]{0,20})?"], cookie: u64) {
            let (found, text) = split(&message);
            prop_assert!(found.is_none() || message.starts_with("netns "));
            prop_assert!(text.len() <= message.len());
            prop_assert!(in_words(text.clone()) == text || text.contains("trouble "));
            let (found, rest) = split(&format!("netns {cookie}: {message}"));
            prop_assert_eq!((found, rest), (Some(cookie), message.replacen(" to ::ffff:", " to ", 1)));
        }
    }
}

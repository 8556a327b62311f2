//! Which Debian archive this machine uses, read from its apt sources: it may be the only one it can reach.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// An archive this machine already uses, with the key it is checked against.
#[derive(Debug, PartialEq)]
pub struct Source {
    pub uri: String,
    pub signed_by: Option<String>,
}

impl Source {
    /// The mirror comes from the machine: it may be the only one it can reach.
    pub fn of_this_machine() -> Result<Self> {
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
            let mut more: Vec<PathBuf> = folder
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect();
            more.sort();
            files.extend(more);
        }
        files
            .iter()
            .filter_map(|file| {
                let text = fs::read_to_string(file).ok()?;
                match file.extension()?.to_str()? {
                    "sources" => source_in_deb822(&text),
                    "list" => source_in_lines(&text),
                    _ => None,
                }
            })
            .next()
            .context("no Debian archive among this machine's apt sources")
    }
}

/// Security archives have no backports, and third-party ones no `main` of Debian's kind.
fn is_debian_archive(uri: &str, suite: &str, components: &str) -> bool {
    uri.trim_end_matches('/').ends_with("/debian")
        && !suite.contains("security")
        && components
            .split_whitespace()
            .any(|component| component == "main")
}

fn source_in_deb822(text: &str) -> Option<Source> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| {
            let mut lines = stanza.lines().filter_map(|line| line.split_once(':'));
            lines
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.trim())
        };
        if field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no")) {
            return None;
        }
        let uri = field("URIs")?.split_whitespace().next()?;
        let suite = field("Suites")?.split_whitespace().next()?;
        // A key written out in the stanza starts on its next line; only a path can be passed on.
        let signed_by = field("Signed-By")
            .filter(|value| value.starts_with('/'))
            .map(str::to_owned);
        is_debian_archive(uri, suite, field("Components")?).then(|| Source {
            uri: uri.to_owned(),
            signed_by,
        })
    })
}

fn source_in_lines(text: &str) -> Option<Source> {
    text.lines().find_map(|line| {
        let mut rest = line.trim().strip_prefix("deb ")?.trim();
        let mut signed_by = None;
        if let Some((options, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
        {
            signed_by = options
                .split_whitespace()
                .find_map(|o| o.strip_prefix("signed-by="))
                .map(str::to_owned);
            rest = after.trim();
        }
        let mut words = rest.splitn(3, ' ');
        let (uri, suite, components) = (words.next()?, words.next()?, words.next()?);
        is_debian_archive(uri, suite, components).then(|| Source {
            uri: uri.to_owned(),
            signed_by,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deb822_main_archive_is_taken_and_security_is_not() {
        let text = "Types: deb\nURIs: http://mirror.test/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\n# comment: here\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n";
        let wanted = Source {
            uri: "http://mirror.test/debian".to_owned(),
            signed_by: Some("/usr/share/keyrings/k.gpg".to_owned()),
        };
        assert_eq!(source_in_deb822(text), Some(wanted));
    }

    #[test]
    fn one_line_source_with_options_is_read() {
        let text = "# deb http://no.test/debian x main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian/ bookworm main contrib\n";
        let wanted = Source {
            uri: "http://mirror.test/debian/".to_owned(),
            signed_by: Some("/k.gpg".to_owned()),
        };
        assert_eq!(source_in_lines(text), Some(wanted));
        assert_eq!(
            source_in_lines("deb http://third.test/apt stable main\n"),
            None
        );
    }
}

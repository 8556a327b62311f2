//! Puts the plugin's entry into a network configuration, and takes it out again. The text around it stays byte for byte.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use crate::cni::NAME;

/// Where the version is missing, as Istio's installer does.
const DEFAULT_VERSION: &str = "0.3.1";
/// Results of older versions have another form, and the plugin refuses them.
const TOO_OLD: [&str; 2] = ["0.1.0", "0.2.0"];
/// In the entry of a list that was made of a single plugin's configuration: the name of that file.
const CONVERTED_FROM: &str = "convertedFrom";

/// Why a file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Container runtimes refuse it too.
    #[error("no network configuration: {0}")]
    Invalid(String),
    /// Container runtimes use it, but this plugin cannot follow.
    #[error("{0}")]
    CannotFollow(String),
}

/// A list without the entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing but the entry was in it.
    Nothing,
    /// A list.
    List(String),
    /// What was a single plugin's configuration before.
    Single {
        /// Its file's name.
        file: String,
        /// Its text.
        text: String,
    },
}

type Fields<'a> = BTreeMap<String, &'a RawValue>;

/// A configuration list and where its plugins are.
struct List<'a> {
    plugins: Vec<Plugin<'a>>,
    /// After the opening bracket.
    start: usize,
}

struct Plugin<'a> {
    at: Range<usize>,
    fields: Fields<'a>,
}

/// A list with `entry` as its last plugin, and nowhere else.
pub fn insert(text: &str, entry: &str) -> Result<String, Unfit> {
    let list = List::parse(text)?;
    if let Some(last) = list.plugins.last()
        && text[last.at.clone()] == *entry
        && list.own().count() == 1
    {
        return Ok(text.to_owned());
    }
    let text = match remove(text)? {
        None => text.to_owned(),
        Some(Rest::List(text)) => text,
        Some(Rest::Single { file, text }) => return convert(&text, &file, entry),
        Some(Rest::Nothing) => {
            return Err(Unfit::Invalid(format!("it has no plugin but {NAME}")));
        }
    };
    let list = List::parse(&text)?;
    let (Some(first), Some(last)) = (list.plugins.first(), list.plugins.last()) else {
        return Err(List::empty());
    };
    // As the list itself parts its bracket from its first plugin: on a line of its own, or not.
    let space = &text[list.start..first.at.start];
    let end = last.at.end;
    Ok(format!("{},{space}{entry}{}", &text[..end], &text[end..]))
}

/// A list of the single plugin in `text`, and `entry`.
pub fn convert(text: &str, file: &str, entry: &str) -> Result<String, Unfit> {
    let fields = fields(text)?;
    fit_single(&fields)?;
    let version = string(&fields, "cniVersion").unwrap_or_else(|| DEFAULT_VERSION.to_owned());
    let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    let name = string(&fields, "name").unwrap_or_else(|| stem.to_owned());
    let mut entry: serde_json::Map<_, _> =
        serde_json::from_str(entry).map_err(|error| Unfit::Invalid(error.to_string()))?;
    entry.insert(CONVERTED_FROM.to_owned(), file.into());
    Ok(format!(
        "{{\"cniVersion\":{},\"name\":{},\"plugins\":[{text},{}]}}\n",
        json!(version),
        json!(name),
        json!(entry)
    ))
}

/// The list without the entry; None if it is not in it.
pub fn remove(text: &str) -> Result<Option<Rest>, Unfit> {
    let list = List::parse(text)?;
    let Some(own) = list.own().next() else {
        return Ok(None);
    };
    if list.plugins.len() == list.own().count() {
        return Ok(Some(Rest::Nothing));
    }
    if let (Some(file), 1, 2) = (
        string(&list.plugins[own].fields, CONVERTED_FROM),
        own,
        list.plugins.len(),
    ) {
        let before = &text[list.start..list.plugins[own].at.start];
        let before = before.rsplit_once(',').map_or(before, |(before, _)| before);
        let text = before.to_owned();
        return Ok(Some(Rest::Single { file, text }));
    }
    let cut = match own {
        0 => list.plugins[0].at.start..list.plugins[1].at.start,
        own => list.plugins[own - 1].at.end..list.plugins[own].at.end,
    };
    let rest = format!("{}{}", &text[..cut.start], &text[cut.end..]);
    Ok(Some(remove(&rest)?.unwrap_or(Rest::List(rest))))
}

/// Whether the plugin can follow this single plugin.
fn fit_single(fields: &Fields) -> Result<(), Unfit> {
    if string(fields, "type").is_none_or(|kind| kind.is_empty()) {
        return Err(Unfit::Invalid("type: missing".to_owned()));
    }
    new_enough(fields)
}

fn new_enough(fields: &Fields) -> Result<(), Unfit> {
    match string(fields, "cniVersion") {
        Some(version) if TOO_OLD.contains(&version.as_str()) => Err(Unfit::CannotFollow(format!(
            "cniVersion: {version:?}: allowed are 0.3.0 and later"
        ))),
        _ => Ok(()),
    }
}

impl<'a> List<'a> {
    fn parse(text: &'a str) -> Result<Self, Unfit> {
        let fields = fields(text)?;
        let Some(raw) = fields.get("plugins") else {
            return Err(Unfit::Invalid("plugins: missing".to_owned()));
        };
        let start = offset(text, raw.get()) + 1;
        let plugins: Vec<&RawValue> = serde_json::from_str(raw.get())
            .map_err(|error| Unfit::Invalid(format!("plugins: {error}")))?;
        if plugins.is_empty() {
            return Err(Self::empty());
        }
        let plugins = plugins.into_iter().map(|raw| {
            let at = offset(text, raw.get());
            let fields = self::fields(raw.get())?;
            if string(&fields, "type").is_none() {
                return Err(Unfit::Invalid("plugins: one has no type".to_owned()));
            }
            let at = at..at + raw.get().len();
            Ok(Plugin { at, fields })
        });
        let plugins = plugins.collect::<Result<_, _>>()?;
        // A list without a version is one of 0.1.0, and runtimes that still take those are as old.
        new_enough(&fields)?;
        Ok(Self { plugins, start })
    }

    fn empty() -> Unfit {
        Unfit::Invalid("plugins: [] is empty".to_owned())
    }

    /// The places of the entry.
    fn own(&self) -> impl Iterator<Item = usize> {
        let own = |plugin: &Plugin| string(&plugin.fields, "type").as_deref() == Some(NAME);
        (0..self.plugins.len()).filter(move |&place| own(&self.plugins[place]))
    }
}

fn fields(text: &str) -> Result<Fields<'_>, Unfit> {
    serde_json::from_str(text).map_err(|error| Unfit::Invalid(error.to_string()))
}

fn string(fields: &Fields, name: &str) -> Option<String> {
    String::deserialize(*fields.get(name)?).ok()
}

/// Where `part` begins, which is a piece of `text`.
fn offset(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = r#"{"type":"redirect-cni","failOpen":false}"#;
    const LISTS: [&str; 4] = [
        r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}"#,
        "{\n  \"plugins\": [\n    { \"type\": \"bridge\",\n      \"x\": [1,2] },\n    {\"type\":\"portmap\"}\n  ],\n  \"cniVersion\": \"0.3.1\", \"name\": \"n\"\n}\n",
        "{\"cniVersion\":\"1.0.0\",\"name\":\"n\",\"plugins\":[ {\"type\":\"a\"} , {\"type\":\"b\",\"n\":1.50} \t]  }\r\n\n",
        r#"{"cniVersion":"0.4.0","name":"plugins","type":"x","plugins":[{"type":"a","plugins":[{"type":"b"}],"k":"]},"}]}"#,
    ];

    #[test]
    fn entry_is_last_and_everything_around_it_stays() {
        for text in LISTS {
            let with = insert(text, ENTRY).expect(text);
            let parsed: serde_json::Value = serde_json::from_str(&with).expect("JSON");
            let plugins = parsed["plugins"].as_array().expect("a list");
            assert_eq!(plugins.last().expect("one")["type"], NAME);
            assert_eq!(insert(&with, ENTRY).expect("again"), with);
            assert_eq!(
                remove(&with).expect("valid"),
                Some(Rest::List(text.to_owned()))
            );
            assert_eq!(remove(text).expect("valid"), None);
        }
    }

    #[test]
    fn entry_that_is_old_doubled_or_not_last_is_put_right() {
        for text in [
            r#"{"name":"n","plugins":[{"type":"redirect-cni"},{"type":"a"},{"type":"redirect-cni"}]}"#,
            r#"{"name":"n","plugins":[{"type":"redirect-cni","failOpen":true},{"type":"a"}]}"#,
            r#"{"name":"n","plugins":[{"type":"a"},{"type":"redirect-cni","failOpen":true}]}"#,
        ] {
            let wanted = format!(r#"{{"name":"n","plugins":[{{"type":"a"}},{ENTRY}]}}"#);
            assert_eq!(insert(text, ENTRY).expect(text), wanted);
        }
    }

    #[test]
    fn single_plugin_becomes_a_list_and_comes_back() {
        for text in [
            r#"{"cniVersion":"0.4.0","name":"n","type":"bridge"}"#,
            "\n{ \"type\": \"calico\",\n \"ipam\": {\"type\":\"x\"} }\n\n",
        ] {
            let list = convert(text, "10-a.conf", ENTRY).expect(text);
            let parsed: serde_json::Value = serde_json::from_str(&list).expect("JSON");
            assert_eq!(parsed["plugins"].as_array().expect("a list").len(), 2);
            assert_eq!(parsed["plugins"][1]["type"], NAME);
            let (file, text) = ("10-a.conf".to_owned(), text.to_owned());
            let single = Rest::Single { file, text };
            assert_eq!(remove(&list).expect("valid"), Some(single.clone()));
            let changed = insert(&list, r#"{"type":"redirect-cni","failOpen":true}"#);
            let changed = changed.expect("converted again");
            assert!(changed.contains("true") && changed != list);
            assert_eq!(remove(&changed).expect("valid"), Some(single));
        }
    }

    #[test]
    fn converted_list_that_others_extended_stays_a_list() {
        let list = convert(r#"{"type":"a"}"#, "a.conf", ENTRY).expect("valid");
        let extended = list.replace("[{", r#"[{"type":"z"},{"#);
        let Some(Rest::List(rest)) = remove(&extended).expect("valid") else {
            panic!("no list: {extended}");
        };
        assert!(rest.contains(r#"[{"type":"z"},{"type":"a"}]"#), "{rest}");
    }

    #[test]
    fn files_that_are_no_configuration_are_refused_with_the_reason() {
        for text in [
            "",
            "{",
            "[]",
            "null",
            r#"{"plugins":{}}"#,
            r#"{"plugins":[]}"#,
            r#"{"plugins":[1]}"#,
            r#"{"plugins":[{}]}"#,
            r#"{"name":"n"}"#,
        ] {
            let error = insert(text, ENTRY).expect_err(text);
            assert!(matches!(error, Unfit::Invalid(_)), "{text}: {error}");
        }
        let error = insert(r#"{"cniVersion":"0.2.0","plugins":[{"type":"a"}]}"#, ENTRY);
        assert!(matches!(error, Err(Unfit::CannotFollow(_))), "{error:?}");
        assert!(convert(r#"{"name":"n"}"#, "a.conf", ENTRY).is_err());
    }
}

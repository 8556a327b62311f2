//! What the tests with random input share. They live in modules named `fuzz`, by which `cargo xtask fuzz` finds them.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Map, Value};

/// As many cases as `PROPTEST_CASES` says, divided by `weight` for inputs that take long.
pub(crate) fn config(weight: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        // What is found becomes a test of its own, not a file of seeds.
        failure_persistence: None,
        cases: default.cases.div_ceil(weight),
        ..default
    }
}

/// Any text: of characters that option values are made of, of any characters, and bytes that were no UTF-8.
pub(crate) fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[0-9a-f:.,/* +-]{0,24}",
        "\\PC{0,24}",
        any::<String>(),
        bytes().prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
    ]
}

/// Any bytes.
pub(crate) fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..64)
}

/// Any JSON, whose objects have some of these names.
pub(crate) fn json(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
        prop::sample::select(names).prop_map(Value::from),
    ];
    let name = prop_oneof![
        4 => prop::sample::select(names).prop_map(str::to_owned),
        1 => text(),
    ];
    leaf.prop_recursive(3, 24, 6, move |inner| {
        let fields = prop::collection::vec((name.clone(), inner.clone()), 0..6);
        prop_oneof![
            prop::collection::vec(inner, 0..4).prop_map(Value::from),
            fields.prop_map(|fields| Value::from(Map::from_iter(fields))),
        ]
    })
}

/// A few edits of a text, each at a random place.
#[derive(Clone, Debug)]
pub(crate) struct Edits(Vec<(Index, Index, Edit)>);

#[derive(Clone, Debug)]
enum Edit {
    Remove,
    Repeat,
    Insert(String),
}

/// None to three edits.
pub(crate) fn edits() -> impl Strategy<Value = Edits> {
    let edit = prop_oneof![
        Just(Edit::Remove),
        Just(Edit::Repeat),
        "[\\[\\]{}\",:\\\\0-9a \n-]{1,3}".prop_map(Edit::Insert),
        text().prop_map(Edit::Insert),
    ];
    prop::collection::vec((any::<Index>(), any::<Index>(), edit), 0..4).prop_map(Edits)
}

impl Edits {
    /// The text, edited.
    pub(crate) fn of(&self, text: &str) -> String {
        let mut chars: Vec<char> = text.chars().collect();
        for (from, length, edit) in &self.0 {
            let from = from.index(chars.len() + 1);
            let to = from + length.index(chars.len() - from + 1).min(8);
            match edit {
                Edit::Remove => drop(chars.drain(from..to)),
                Edit::Repeat => {
                    let again = chars[from..to].to_vec();
                    chars.splice(to..to, again);
                }
                Edit::Insert(text) => drop(chars.splice(from..from, text.chars())),
            }
        }
        chars.into_iter().collect()
    }
}

/// Whether a message stays on one line.
pub(crate) fn is_one_line(message: &str) -> bool {
    !message.is_empty() && !message.contains(char::is_control)
}

//! A label selector on the command line.

use std::collections::BTreeMap;
use std::str::FromStr;

use k8s_openapi::api::core::v1::Pod;
use kube::core::{Expression, Selector, SelectorExt};

/// Selects pods by their labels, as `kubectl --selector` does with `=`, `!=` and names alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelSelector(Selector);

impl LabelSelector {
    /// Whether the pod's labels fit all of it.
    #[must_use]
    pub fn selects(&self, pod: &Pod) -> bool {
        let none = BTreeMap::new();
        self.0
            .matches(pod.metadata.labels.as_ref().unwrap_or(&none))
    }
}

impl FromStr for LabelSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expressions: Vec<Expression> = text
            .split(',')
            .map(|entry| expression(entry.trim()))
            .collect::<Result<_, _>>()?;
        Ok(Self(expressions.into_iter().collect()))
    }
}

fn expression(entry: &str) -> Result<Expression, String> {
    let made = if let Some((key, value)) = entry.split_once("!=") {
        (key, Expression::NotEqual(key.to_owned(), value.to_owned()))
    } else if let Some((key, value)) = entry.split_once("==").or_else(|| entry.split_once('=')) {
        (key, Expression::Equal(key.to_owned(), value.to_owned()))
    } else if let Some(key) = entry.strip_prefix('!') {
        (key, Expression::DoesNotExist(key.to_owned()))
    } else {
        (entry, Expression::Exists(entry.to_owned()))
    };
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    match made {
        (key, expression) if !key.is_empty() && key.chars().all(named) => Ok(expression),
        _ => Err(format!(
            "{entry:?} is not a part of a selector: allowed are KEY=VALUE, KEY!=VALUE, KEY and !KEY, with commas between them"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labelled(text: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.labels = Some(
            text.split(',')
                .filter_map(|label| label.split_once('='))
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .collect(),
        );
        pod
    }

    #[test]
    fn every_part_has_to_fit() {
        for (selector, labels, expected) in [
            ("app=cart", "app=cart,tier=web", true),
            ("app==cart", "app=cart", true),
            ("app=cart", "app=shop", false),
            ("app=cart", "", false),
            ("app=cart,tier=web", "app=cart,tier=web", true),
            ("app=cart,tier=web", "app=cart", false),
            ("app!=cart", "app=shop", true),
            ("app!=cart", "app=cart", false),
            ("example.com/mesh", "example.com/mesh=", true),
            ("example.com/mesh", "app=cart", false),
            ("!app", "tier=web", true),
            ("!app", "app=cart", false),
            (" app = cart ", "app=cart", false),
        ] {
            let Ok(parsed) = selector.parse::<LabelSelector>() else {
                assert!(selector.contains(' '), "{selector}");
                continue;
            };
            assert_eq!(
                parsed.selects(&labelled(labels)),
                expected,
                "{selector} {labels}"
            );
        }
    }

    #[test]
    fn what_is_no_selector_is_refused_by_name() {
        for text in ["", "=cart", "app=cart,", "app in (a)", "!"] {
            let error = text.parse::<LabelSelector>().expect_err(text);
            assert!(error.contains("allowed are"), "{error}");
        }
    }
}

//! What `ADD` answers: the result of the plugins before this one, as it came.

use std::collections::BTreeMap;

use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};

use super::config::Version;
use super::error::{Code, Failure, Result};

/// The answer in that version. Without a former result, this plugin stands alone and has none of its own.
pub fn echo(previous: Option<&RawValue>, version: Version) -> Result<String> {
    let Some(previous) = previous else {
        return Ok(json!({ "cniVersion": version.as_str(), "dns": {} }).to_string());
    };
    let wrong = |error| Failure::new(Code::Config, format!("prevResult: {error}"));
    let mut fields: BTreeMap<String, Box<RawValue>> =
        serde_json::from_str(previous.get()).map_err(wrong)?;
    let written: Option<Option<String>> = fields
        .get("cniVersion")
        .map(|raw| serde_json::from_str(raw.get()))
        .transpose()
        .map_err(wrong)?;
    match written.flatten().as_deref() {
        Some(same) if same == version.as_str() => return Ok(previous.get().to_owned()),
        Some(other) if !Version::parse(other).is_some_and(|other| other.reads_as(version)) => {
            return Err(Failure::new(
                Code::Config,
                format!(
                    "prevResult.cniVersion: {other:?}: allowed is {version}, as cniVersion says"
                ),
            ));
        }
        _ => {}
    }
    // Every other field stays as it was written: numbers, too, of which a parser keeps only so many digits.
    let label = to_raw_value(version.as_str()).map_err(wrong)?;
    fields.insert("cniVersion".to_owned(), label);
    serde_json::to_string(&fields).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        RawValue::from_string(text.to_owned()).expect("JSON")
    }

    #[test]
    fn result_of_the_same_version_is_given_back_byte_by_byte() {
        let text = "{\"z\": 1.50,\n \"cniVersion\" :\"1.0.0\", \"a\":[ ]}";
        assert_eq!(echo(Some(&raw(text)), Version::V1_0_0).expect("echo"), text);
    }

    #[test]
    fn result_of_a_version_that_reads_alike_is_relabelled_and_others_refused() {
        let old = raw(r#"{"cniVersion":"0.3.1","ips":[]}"#);
        let echoed = echo(Some(&old), Version::V0_4_0).expect("alike");
        assert_eq!(echoed, r#"{"cniVersion":"0.4.0","ips":[]}"#);
        let exact = raw(r#"{"cniVersion":"0.4.0","n":-9.060041486363714e+145}"#);
        let echoed = echo(Some(&exact), Version::V0_3_1).expect("alike");
        assert_eq!(
            echoed,
            r#"{"cniVersion":"0.3.1","n":-9.060041486363714e+145}"#
        );
        let error = echo(Some(&old), Version::V1_0_0).expect_err("not alike");
        assert!(
            error
                .message
                .starts_with("prevResult.cniVersion: \"0.3.1\""),
            "{error}"
        );
        for bad in ["[]", "1", "null", "[\"1.0.0\"]"] {
            let error = echo(Some(&raw(bad)), Version::V1_0_0).expect_err(bad);
            assert_eq!(error.code, Code::Config);
        }
    }

    #[test]
    fn plugin_that_stands_alone_answers_an_empty_result() {
        assert_eq!(
            echo(None, Version::V1_1_0).expect("echo"),
            r#"{"cniVersion":"1.1.0","dns":{}}"#
        );
    }
}

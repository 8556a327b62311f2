//! What is built here and run there.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::image::Image;
use super::in_workspace;
use crate::cargo;
use crate::ui;

/// Where the guest has the tests; they look for the programs they call in the directories above.
pub const TESTS: &str = "/vm/deps";
const PROGRAMS: &[&str] = &["redirect", "actor"];
/// What a test reads of the workspace, at the same path as here.
const FILES: &[&str] = &["docs/behaviour.md"];

/// One of cargo's messages, as far as it is of use here.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// A test program: its name and where it is built.
pub type Test = (String, PathBuf);

/// Builds redirect and, if wanted, all kernel-level tests.
pub fn build() -> Result<Vec<Test>> {
    cargo::build(false)?;
    let mut command = cargo::at_root()?;
    command.args(["test", "--no-run", "--package=redirect-tests"]);
    ui::command(&command);
    command.arg("--message-format=json-render-diagnostics");
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the tests do not build ({})", output.status);
    }
    Ok(tests(&String::from_utf8_lossy(&output.stdout)))
}

fn tests(messages: &str) -> Vec<Test> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter(|message| message.profile.as_ref().is_some_and(|profile| profile.test))
        .filter_map(|message| {
            let target = message.target?;
            // The library's and the actor's own tests need no kernel.
            let wanted = target.kind.iter().any(|kind| kind == "test");
            wanted.then_some((target.name, message.executable?))
        })
        .collect()
}

/// Adds this program, redirect, and the tests.
pub fn add(image: &mut Image, tests: &[Test]) -> Result<()> {
    let myself = std::env::current_exe().context("cannot find this program")?;
    image.add_as(&myself, "/xtask")?;
    let redirect = cargo::built_binary(false)?;
    image.add_as(&redirect, "/usr/bin/redirect")?;
    let built = redirect.parent().context("the program has no folder")?;
    for (name, path) in tests {
        image.add_as(path, &format!("{TESTS}/{name}"))?;
    }
    if !tests.is_empty() {
        for program in PROGRAMS {
            image.add_as(&built.join(program), &format!("/vm/{program}"))?;
        }
        for file in FILES {
            image.add(&in_workspace(file)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn test_programs_are_taken_from_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"outbound","kind":["test"]},"profile":{"test":true},"executable":"/t/outbound-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"actor","kind":["bin"]},"profile":{"test":false},"executable":"/t/actor"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"redirect_tests","kind":["lib"]},"profile":{"test":true},"executable":"/t/lib-2"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let wanted = vec![("outbound".to_owned(), PathBuf::from("/t/outbound-1"))];
        assert_eq!(tests(messages), wanted);
    }
}

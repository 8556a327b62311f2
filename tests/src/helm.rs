//! Helm, as far as it needs no cluster: the chart rendered and linted as `helm install` does it.

use std::{
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{kubectl::kubernetes_programs, manifests::deploy};

/// As in `docs/kubernetes.md`.
const NAMESPACE: &str = "redirect-system";
/// The oldest that the chart allows.
const KUBERNETES: &str = "v1.30.0";
/// Seconds that all of a call's charts may take.
const LIMIT: &str = "120";
const SCRIPT: &str = "
import json, sys
from helm_python import HelmError, chart
order = json.load(sys.stdin)
def render(values):
    try:
        return {'Ok': chart.Chart.load(order['chart']).render(values, name='redirect', namespace=order['namespace'])}
    except HelmError as error:
        return {'Err': str(error)}
def lint(values):
    found = chart.lint(order['chart'], values, strict=True, namespace=order['namespace'], kube_version=order['kubernetes'])
    return found['messages'] + [{'severity': 3, 'path': '', 'error': str(error)} for error in found['errors']]
json.dump([{'render': render, 'lint': lint}[order['do']](values) for values in order['values']], sys.stdout)
";

/// Helm, with the chart of `deploy/helm`.
pub struct Helm {
    programs: PathBuf,
    chart: PathBuf,
}

/// What `helm lint` says.
#[derive(Debug, Deserialize)]
pub struct Message {
    /// 1: for information; 2: a warning; 3: an error.
    pub severity: u8,
    /// The file.
    pub path: String,
    /// What is wrong there.
    pub error: String,
}

impl Helm {
    /// Where Helm is: in the directory of [`kubernetes_programs`]; else what was looked at.
    pub fn find() -> Result<Self, String> {
        let programs = kubernetes_programs()?;
        let library = programs.join("helm_python");
        if !library.is_dir() {
            return Err(format!("no {}", library.display()));
        }
        let chart = deploy().join("helm/redirect");
        Ok(Self { programs, chart })
    }

    /// The objects that would be installed with each of these values, or why not.
    pub fn render(&self, values: &[Value]) -> Vec<Result<Vec<Value>, String>> {
        type Files = std::collections::BTreeMap<String, String>;
        let rendered: Vec<Result<Files, String>> = self.run("render", values);
        let read = |files: Files| {
            let manifests = files.iter().filter(|(path, _)| path.ends_with(".yaml"));
            let read = manifests.map(|(path, text)| -> Vec<Value> {
                serde_saphyr::from_multiple(text)
                    .unwrap_or_else(|error| panic!("{path}: {error}\n{text}"))
            });
            read.flatten().collect()
        };
        rendered.into_iter().map(|files| files.map(read)).collect()
    }

    /// What the strict linter finds with each of these values.
    pub fn lint(&self, values: &[Value]) -> Vec<Vec<Message>> {
        self.run("lint", values)
    }

    fn run<T: DeserializeOwned>(&self, what: &str, values: &[Value]) -> T {
        let order = json!({
            "do": what, "chart": self.chart, "values": values,
            "namespace": NAMESPACE, "kubernetes": KUBERNETES,
        });
        let mut child = Command::new("timeout")
            .args([LIMIT, "python3", "-c", SCRIPT])
            .env("PYTHONPATH", &self.programs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(order.to_string().as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
    }
}

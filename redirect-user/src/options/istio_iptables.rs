//! What istio-iptables takes beside the capture flags.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::error::{Entry, OptionError};
use super::flags::CaptureFlags;
use super::names::{Names, SystemNames};
use super::policy::Policy;
use super::ports::{PORT, listening_port};
use super::setting::Setting;
use super::switches::{BOOLEAN, boolean};

pub(super) const DURATION: &str = "durations above 0 such as 5s, 500ms or 1m30s";
pub(super) const BINARY: &str = "legacy and nft";

/// Istio's default for `--iptables-probe-port`.
const PROBE_PORT: u16 = 15002;
/// Istio's default for `--probe-timeout`.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// istio-iptables' flags, as typed. Values are text, as in [`CaptureFlags`].
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "What is done")]
pub struct IstioIptablesFlags {
    /// Print what would be done and change nothing; $DRY_RUN_FILE_PATH names a file for a copy [env: DRY_RUN]
    #[arg(short = 'n', long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "dry_run")]
    pub dry_run: Option<String>,

    /// Do not attach; validation still runs if asked for [env: SKIP_RULE_APPLY]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "skip_rule_apply")]
    pub skip_rule_apply: Option<String>,

    /// Detach the pod and do not attach it; fine if it is not attached [env: CLEANUP_ONLY]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "cleanup_only")]
    pub cleanup_only: Option<String>,

    /// Then check, as the proxy's user, that connections are captured; ends with 126 if not [env: RUN_VALIDATION]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "run_validation")]
    pub run_validation: Option<String>,

    /// Port that validation connects to [default: 15002] [env: IPTABLES_PROBE_PORT]
    #[arg(
        long,
        value_name = "PORT",
        allow_hyphen_values = true,
        overrides_with = "iptables_probe_port"
    )]
    pub iptables_probe_port: Option<String>,

    /// How long validation may take [default: 5s] [env: PROBE_TIMEOUT]
    #[arg(
        long,
        value_name = "DURATION",
        allow_hyphen_values = true,
        overrides_with = "probe_timeout"
    )]
    pub probe_timeout: Option<String>,

    /// Bring what is attached up to date: done always [env: RECONCILE]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "reconcile", help_heading = "Without effect")]
    pub reconcile: Option<String>,

    /// Attach even if nothing has changed: there is nothing to do then [env: FORCE_APPLY]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "force_apply", help_heading = "Without effect")]
    pub force_apply: Option<String>,

    /// Drop packets that conntrack calls invalid: there is no address translation they could escape
    /// [env: DROP_INVALID, INVALID_DROP]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "drop_invalid", help_heading = "Without effect")]
    pub drop_invalid: Option<String>,

    /// Which iptables to call, legacy or nft: none is called [env: FORCE_IPTABLES_BINARY]
    #[arg(
        long,
        value_name = "NAME",
        allow_hyphen_values = true,
        overrides_with = "force_iptables_binary",
        help_heading = "Without effect"
    )]
    pub force_iptables_binary: Option<String>,

    /// Use nftables instead of iptables: neither is used [env: NATIVE_NFTABLES]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "native_nftables", help_heading = "Without effect")]
    pub native_nftables: Option<String>,

    /// How iptables is locked and sandboxed: it is not called [env: CNI_MODE]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "cni_mode", help_heading = "Without effect")]
    pub cni_mode: Option<String>,

    /// Whose iptables lock is taken; Istio does not enter it either [env: NETWORK_NAMESPACE]
    #[arg(
        long,
        value_name = "PATH",
        allow_hyphen_values = true,
        overrides_with = "network_namespace",
        help_heading = "Without effect"
    )]
    pub network_namespace: Option<String>,

    /// Istio's log levels: $REDIRECT_LOG sets ours
    #[arg(
        long = "log_output_level",
        value_name = "LEVELS",
        allow_hyphen_values = true,
        overrides_with = "log_output_level",
        help_heading = "Without effect"
    )]
    pub log_output_level: Option<String>,

    /// Istio's log format: messages are plain lines on stderr
    #[arg(long = "log_as_json", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "log_as_json", help_heading = "Without effect")]
    pub log_as_json: Option<String>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "a doc comment would replace the group's help")]
    pub capture: CaptureFlags,
}

/// A validated call of istio-iptables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IstioIptables {
    /// What is captured.
    pub policy: Policy,
    /// Only say what would be done.
    pub dry_run: Option<DryRun>,
    /// What becomes of the attachment.
    pub change: Change,
    /// Check afterwards that connections are captured.
    pub validation: Option<Validation>,
}

/// Where a dry run goes, beside stdout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DryRun {
    /// `DRY_RUN_FILE_PATH`
    pub transcript: Option<PathBuf>,
}

/// What is done to the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is attached, or brought up to date.
    Attach,
    /// It is detached.
    Detach,
    /// Nothing.
    None,
}

/// How capture is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validation {
    /// Port connected to, host order.
    pub port: u16,
    /// When to give up; above 0.
    pub timeout: Duration,
}

impl IstioIptablesFlags {
    /// As [`CaptureFlags::validate`], for all flags.
    ///
    /// # Errors
    /// The first option that is refused.
    pub fn validate(&self, env: Env<'_>) -> Result<IstioIptables, OptionError> {
        self.validate_with(env, &SystemNames)
    }

    /// As [`validate`](Self::validate), with another source of names.
    ///
    /// # Errors
    /// The first option that is refused.
    pub fn validate_with(
        &self,
        env: Env<'_>,
        names: &dyn Names,
    ) -> Result<IstioIptables, OptionError> {
        let policy = self.capture.validate_with(env, names)?;
        self.check_those_without_effect(env)?;
        let dry_run = switch(&self.dry_run, "dry-run", &["DRY_RUN"], env)?;
        let skip = switch(
            &self.skip_rule_apply,
            "skip-rule-apply",
            &["SKIP_RULE_APPLY"],
            env,
        )?;
        let cleanup = switch(&self.cleanup_only, "cleanup-only", &["CLEANUP_ONLY"], env)?;
        let validation = self.validation(env)?;
        let transcript = env("DRY_RUN_FILE_PATH").filter(|path| !path.is_empty());
        Ok(IstioIptables {
            policy,
            dry_run: dry_run.then(|| DryRun {
                transcript: transcript.map(PathBuf::from),
            }),
            change: match (skip, cleanup) {
                (true, _) => Change::None,
                (false, true) => Change::Detach,
                (false, false) => Change::Attach,
            },
            validation,
        })
    }

    fn validation(&self, env: Env<'_>) -> Result<Option<Validation>, OptionError> {
        let run = switch(
            &self.run_validation,
            "run-validation",
            &["RUN_VALIDATION"],
            env,
        )?;
        let port = Setting::find(
            &self.iptables_probe_port,
            "iptables-probe-port",
            &["IPTABLES_PROBE_PORT"],
            env,
        )
        .map_or(Ok(PROBE_PORT), |setting| setting.read(PORT, probe_port))?;
        let timeout = Setting::find(
            &self.probe_timeout,
            "probe-timeout",
            &["PROBE_TIMEOUT"],
            env,
        )
        .map_or(Ok(PROBE_TIMEOUT), |setting| {
            setting.read(DURATION, duration)
        })?;
        Ok(run.then_some(Validation { port, timeout }))
    }

    /// A mistake in them would go unnoticed otherwise. Paths and log levels may be anything.
    fn check_those_without_effect(&self, env: Env<'_>) -> Result<(), OptionError> {
        switch(&self.reconcile, "reconcile", &["RECONCILE"], env)?;
        switch(&self.force_apply, "force-apply", &["FORCE_APPLY"], env)?;
        switch(
            &self.drop_invalid,
            "drop-invalid",
            &["DROP_INVALID", "INVALID_DROP"],
            env,
        )?;
        switch(
            &self.native_nftables,
            "native-nftables",
            &["NATIVE_NFTABLES"],
            env,
        )?;
        switch(&self.cni_mode, "cni-mode", &["CNI_MODE"], env)?;
        switch(&self.log_as_json, "log_as_json", &[], env)?;
        Setting::find(
            &self.force_iptables_binary,
            "force-iptables-binary",
            &["FORCE_IPTABLES_BINARY"],
            env,
        )
        .map_or(Ok(()), |setting| setting.read(BINARY, binary))
    }
}

fn switch(
    flag: &Option<String>,
    name: &str,
    variables: &[&str],
    env: Env<'_>,
) -> Result<bool, OptionError> {
    Setting::find(flag, name, variables, env)
        .map_or(Ok(false), |setting| setting.read(BOOLEAN, boolean))
}

fn probe_port(text: &str) -> Result<u16, Entry> {
    listening_port(text).map_err(|entry| Entry::new(&entry.text, "is not a port to connect to"))
}

fn duration(text: &str) -> Result<Duration, Entry> {
    let text = text.trim();
    go_duration(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| Entry::new(text, "is not a time to wait"))
}

/// Go's `time.ParseDuration` without a sign: numbers, each with a unit, maybe with a fraction. Nothing at all is zero.
fn go_duration(text: &str) -> Option<Duration> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let (mut total, mut rest) = (Duration::ZERO, text);
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c| !is_number(c))?);
        let (unit, tail) = tail.split_at(tail.find(is_number).unwrap_or(tail.len()));
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" | "μs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let seconds = number.parse::<f64>().ok()? * seconds;
        total = total.checked_add(Duration::try_from_secs_f64(seconds).ok()?)?;
        rest = tail;
    }
    Some(total)
}

fn binary(text: &str) -> Result<(), Entry> {
    match text {
        "" | "legacy" | "nft" => Ok(()),
        _ => Err(Entry::new(text, "is not an iptables binary")),
    }
}

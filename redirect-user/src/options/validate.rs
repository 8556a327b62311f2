//! Flags, environment and defaults together, into a [`Policy`].

use redirect_common::pod::{MAX_OWNER_GROUPS, MAX_PROXY_IDS};

use super::error::OptionError;
use super::flags::CaptureFlags;
use super::identity::{GROUPS, GROUPS_OR_ALL, Kind, USERS, group_scope, group_set, proxy_ids};
use super::names::{Names, SystemNames};
use super::policy::{Ipv6, Policy};
use super::ports::{PORT, PORTS, PORTS_OR_ALL, listening_port, port_list, port_scope};
use super::ranges::{IdRange, PortRange};
use super::setting::{Setting, entries};
use super::switches::{BOOLEAN, IPV6, Ipv6Choice, MODE, boolean, ipv6, mode};
use super::{cidrs, cidrs::CIDRS, cidrs::CIDRS_OR_ALL, cidrs::LOOPBACK};

/// User whose uid is the proxy's, unless `ENVOY_USER` names another.
const PROXY_USER: &str = "istio-proxy";

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl CaptureFlags {
    /// Checks every option; names come from the system's databases.
    ///
    /// `env` answers what a variable is set to: [`process_env`](super::process_env), or a test's own.
    ///
    /// # Errors
    /// The first option that is refused; those not supported yet come first.
    pub fn validate(&self, env: Env<'_>) -> Result<Policy, OptionError> {
        self.validate_with(env, &SystemNames)
    }

    /// As [`validate`](Self::validate), with another source of names.
    ///
    /// # Errors
    /// The first option that is refused.
    pub fn validate_with(&self, env: Env<'_>, names: &dyn Names) -> Result<Policy, OptionError> {
        self.refuse_unsupported(env)?;
        let mut policy = Policy::default();
        self.listeners(env, &mut policy)?;
        self.identities(env, names, &mut policy)?;
        self.cidrs(env, &mut policy)?;
        self.ports(env, names, &mut policy)?;
        self.owner_groups(env, names, &mut policy)?;
        policy.ipv6 = self.families(env)?;
        Ok(policy)
    }

    fn listeners(&self, env: Env<'_>, policy: &mut Policy) -> Result<(), OptionError> {
        // Istio gives -p no variable: ENVOY_PORT is only printed.
        let outbound = Setting::find(&self.envoy_port, "envoy-port", &[], env);
        let inbound = Setting::find(
            &self.inbound_capture_port,
            "inbound-capture-port",
            &["INBOUND_CAPTURE_PORT"],
            env,
        );
        let tunnel = Setting::find(
            &self.inbound_tunnel_port,
            "inbound-tunnel-port",
            &["INBOUND_TUNNEL_PORT"],
            env,
        );
        for (setting, port) in [
            (outbound, &mut policy.outbound_port),
            (inbound, &mut policy.inbound_port),
            (tunnel, &mut policy.tunnel_port),
        ] {
            if let Some(setting) = setting {
                *port = setting.read(PORT, listening_port)?;
            }
        }
        Ok(())
    }

    fn identities(
        &self,
        env: Env<'_>,
        names: &dyn Names,
        policy: &mut Policy,
    ) -> Result<(), OptionError> {
        let given = |setting: &Setting| !setting.value.trim().is_empty();
        let uid = Setting::find(&self.proxy_uid, "proxy-uid", &["PROXY_UID"], env).filter(given);
        let gid = Setting::find(&self.proxy_gid, "proxy-gid", &["PROXY_GID"], env).filter(given);

        // Without -g, Istio hands the text of -u to --gid-owner: a name in it is then a group's.
        let gid = gid.or_else(|| {
            let uid = uid.clone()?;
            Some(Setting {
                origin: format!("--proxy-gid, taken from {}", uid.origin),
                ..uid
            })
        });
        match uid {
            Some(uid) => {
                policy.proxy_uids = uid.read(USERS, |text| {
                    proxy_ids(text, Kind::User, &|name| names.user(name))
                })?;
                uid.at_most(MAX_PROXY_IDS)?;
            }
            None => {
                let user = env("ENVOY_USER").unwrap_or_else(|| PROXY_USER.to_owned());
                if let Some(id) = names.user(&user) {
                    policy.proxy_uids = vec![IdRange {
                        first: id,
                        last: id,
                    }];
                }
                policy.proxy_gids = policy.proxy_uids.clone();
            }
        }
        if let Some(gid) = gid {
            policy.proxy_gids = gid.read(GROUPS, |text| {
                proxy_ids(text, Kind::Group, &|name| names.group(name))
            })?;
            gid.at_most(MAX_PROXY_IDS)?;
        }
        Ok(())
    }

    fn cidrs(&self, env: Env<'_>, policy: &mut Policy) -> Result<(), OptionError> {
        let include = Setting::find(
            &self.istio_service_cidr,
            "istio-service-cidr",
            &["ISTIO_SERVICE_CIDR"],
            env,
        );
        if let Some(setting) = include {
            let included = setting.read(CIDRS_OR_ALL, cidrs::cidr_scope)?;
            policy.include_outbound_cidrs = included.scope;
            policy.loopback_included = included.loopback;
        }
        let exclude = Setting::find(
            &self.istio_service_exclude_cidr,
            "istio-service-exclude-cidr",
            &["ISTIO_SERVICE_EXCLUDE_CIDR"],
            env,
        );
        if let Some(setting) = exclude {
            policy.exclude_outbound_cidrs = setting.read(CIDRS, cidrs::cidr_list)?;
        }
        let loopback = Setting::find(
            &self.outbound_ipv4_loopback_cidr,
            "outbound-ipv4-loopback-cidr",
            &["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"],
            env,
        );
        if let Some(setting) = loopback {
            policy.loopback = setting.read(LOOPBACK, cidrs::loopback_cidr)?;
        }
        Ok(())
    }

    fn ports(
        &self,
        env: Env<'_>,
        names: &dyn Names,
        policy: &mut Policy,
    ) -> Result<(), OptionError> {
        let inbound = Setting::find(
            &self.istio_inbound_ports,
            "istio-inbound-ports",
            &["ISTIO_INBOUND_PORTS"],
            env,
        );
        if let Some(setting) = inbound {
            policy.inbound_ports = setting.read(PORTS_OR_ALL, |text| port_scope(text, names))?;
        }
        let list = |flag, name, variable| -> Result<Vec<PortRange>, OptionError> {
            match Setting::find(flag, name, &[variable], env) {
                Some(setting) => setting.read(PORTS, |text| port_list(text, names)),
                None => Ok(Vec::new()),
            }
        };
        policy.exclude_inbound_ports = list(
            &self.istio_local_exclude_ports,
            "istio-local-exclude-ports",
            "ISTIO_LOCAL_EXCLUDE_PORTS",
        )?;
        policy.exclude_outbound_ports = list(
            &self.istio_local_outbound_ports_exclude,
            "istio-local-outbound-ports-exclude",
            "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE",
        )?;
        policy.include_outbound_ports = list(
            &self.istio_outbound_ports,
            "istio-outbound-ports",
            "ISTIO_OUTBOUND_PORTS",
        )?;
        Ok(())
    }

    fn owner_groups(
        &self,
        env: Env<'_>,
        names: &dyn Names,
        policy: &mut Policy,
    ) -> Result<(), OptionError> {
        let group = |name: &str| names.group(name);
        let include = Setting::find(
            &self.outbound_owner_groups,
            "outbound-owner-groups",
            &["ISTIO_OUTBOUND_OWNER_GROUPS"],
            env,
        );
        if let Some(setting) = include {
            policy.owner_groups = setting.read(GROUPS_OR_ALL, |text| group_scope(text, &group))?;
            // Counted as given, as Istio does, not as merged.
            let got = entries(&setting.value).count();
            if got > MAX_OWNER_GROUPS {
                let Setting { origin, value } = setting;
                return Err(OptionError::TooManyOwnerGroups {
                    origin,
                    value,
                    max: MAX_OWNER_GROUPS,
                    got,
                });
            }
        }
        let exclude = Setting::find(
            &self.outbound_owner_groups_exclude,
            "outbound-owner-groups-exclude",
            &["ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"],
            env,
        );
        if let Some(setting) = exclude {
            policy.owner_groups_exclude = setting.read(GROUPS, |text| group_set(text, &group))?;
            setting.at_most(MAX_OWNER_GROUPS)?;
        }
        Ok(())
    }

    fn families(&self, env: Env<'_>) -> Result<Ipv6, OptionError> {
        let dual_stack = Setting::find(
            &self.dual_stack,
            "dual-stack",
            &["DUAL_STACK", "ISTIO_DUAL_STACK"],
            env,
        )
        .map_or(Ok(false), |setting| setting.read(BOOLEAN, boolean))?;
        let choice = Setting::find(&self.ipv6, "ipv6", &[], env)
            .map_or(Ok(Ipv6Choice::Auto), |setting| setting.read(IPV6, ipv6))?;
        Ok(match choice {
            Ipv6Choice::Auto if dual_stack => Ipv6::DualStack,
            Ipv6Choice::Auto => Ipv6::Auto,
            Ipv6Choice::On => Ipv6::On,
            Ipv6Choice::Off => Ipv6::Off,
        })
    }

    /// Options of istio-iptables that change what is captured and that this version cannot honour: never ignored.
    fn refuse_unsupported(&self, env: Env<'_>) -> Result<(), OptionError> {
        let interception = Setting::find(
            &self.istio_inbound_interception_mode,
            "istio-inbound-interception-mode",
            &["ISTIO_INBOUND_INTERCEPTION_MODE"],
            env,
        );
        if let Some(setting) = interception {
            if setting.value.trim() == "TPROXY" {
                return Err(setting.not_supported());
            }
            setting.read(MODE, mode)?;
        }
        let dns = Setting::find(
            &self.redirect_dns,
            "redirect-dns",
            &["REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"],
            env,
        );
        let all_dns = Setting::find(
            &self.capture_all_dns,
            "capture-all-dns",
            &["CAPTURE_ALL_DNS"],
            env,
        );
        for setting in [dns, all_dns].into_iter().flatten() {
            if setting.read(BOOLEAN, boolean)? {
                return Err(setting.not_supported());
            }
        }
        let interfaces = Setting::find(
            &self.istio_exclude_interfaces,
            "istio-exclude-interfaces",
            &["ISTIO_EXCLUDE_INTERFACES"],
            env,
        );
        let virtual_interfaces = Setting::find(
            &self.kube_virt_interfaces,
            "kube-virt-interfaces",
            &["KUBE_VIRT_INTERFACES"],
            env,
        );
        for setting in [interfaces, virtual_interfaces].into_iter().flatten() {
            if entries(&setting.value).next().is_some() {
                return Err(setting.not_supported());
            }
        }
        match Setting::find(&self.resolv_conf, "resolv-conf", &[], env) {
            Some(setting) if !setting.value.is_empty() => Err(setting.not_supported()),
            _ => Ok(()),
        }
    }
}

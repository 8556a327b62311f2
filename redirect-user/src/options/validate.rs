//! Flags, environment and defaults together, into a [`Policy`].

use redirect_common::pod::{MAX_OWNER_GROUPS, MAX_PROXY_IDS};

use super::dns::{Dns, RESOLV_CONF, servers_of};
use super::error::{Entry, OptionError};
use super::flags::CaptureFlags;
use super::identity::{GROUPS, GROUPS_OR_ALL, Kind, USERS, group_scope, group_set, proxy_ids};
use super::interception::{self, MODE, Mode, NUMBER, TPROXY_MARK, TPROXY_TABLE, is_tproxy};
use super::interfaces::{INTERFACES, interface_list};
use super::names::{Names, SystemNames};
use super::policy::{Ipv6, Policy};
use super::ports::{PORT, PORTS, PORTS_OR_ALL, listening_port, port_list, port_scope};
use super::ranges::{IdRange, PortRange};
use super::setting::{Setting, entries};
use super::switches::{BOOLEAN, IPV6, Ipv6Choice, boolean, ipv6};
use super::{cidrs, cidrs::CIDRS, cidrs::CIDRS_OR_ALL, cidrs::LOOPBACK};

/// User whose uid is the proxy's, unless `ENVOY_USER` names another.
const PROXY_USER: &str = "istio-proxy";

/// Why `-k` is refused in TPROXY mode.
const WITH_TPROXY: &str = "--istio-inbound-interception-mode TPROXY: everything that comes by these interfaces, to whatever destination, would go to the inbound listener";

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl CaptureFlags {
    /// Checks every option; names come from the system's databases.
    ///
    /// `env` answers what a variable is set to: [`process_env`](super::process_env), or a test's own.
    ///
    /// # Errors
    /// The first option that is refused.
    pub fn validate(&self, env: Env<'_>) -> Result<Policy, OptionError> {
        self.validate_with(env, &SystemNames)
    }

    /// As [`validate`](Self::validate), with another source of names.
    ///
    /// # Errors
    /// The first option that is refused.
    pub fn validate_with(&self, env: Env<'_>, names: &dyn Names) -> Result<Policy, OptionError> {
        let mut policy = Policy::default();
        self.listeners(env, &mut policy)?;
        self.identities(env, names, &mut policy)?;
        self.cidrs(env, &mut policy)?;
        self.ports(env, names, &mut policy)?;
        self.owner_groups(env, names, &mut policy)?;
        policy.ipv6 = self.families(env)?;
        policy.mode = self.interception(env)?;
        policy.dns = self.dns(env)?;
        self.interfaces(env, &mut policy)?;
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

    fn interception(&self, env: Env<'_>) -> Result<Mode, OptionError> {
        let number = |flag, name, variable, default, parse: fn(&str) -> Result<u32, Entry>| {
            Setting::find(flag, name, &[variable], env)
                .map_or(Ok(default), |setting| setting.read(NUMBER, parse))
        };
        // Checked in either mode: a mistake in them is not to wait for the day TPROXY is switched on.
        let mark = number(
            &self.istio_inbound_tproxy_mark,
            "istio-inbound-tproxy-mark",
            "ISTIO_INBOUND_TPROXY_MARK",
            TPROXY_MARK,
            interception::mark,
        )?;
        let table = number(
            &self.istio_inbound_tproxy_route_table,
            "istio-inbound-tproxy-route-table",
            "ISTIO_INBOUND_TPROXY_ROUTE_TABLE",
            TPROXY_TABLE,
            interception::table,
        )?;
        let tproxy = Setting::find(
            &self.istio_inbound_interception_mode,
            "istio-inbound-interception-mode",
            &["ISTIO_INBOUND_INTERCEPTION_MODE"],
            env,
        )
        .map_or(Ok(false), |setting| setting.read(MODE, is_tproxy))?;
        Ok(if tproxy {
            Mode::Tproxy { mark, table }
        } else {
            Mode::Redirect
        })
    }

    fn dns(&self, env: Env<'_>) -> Result<Dns, OptionError> {
        let boolean = |setting: Option<Setting>| {
            setting.map_or(Ok(false), |setting| setting.read(BOOLEAN, boolean))
        };
        let redirect = boolean(Setting::find(
            &self.redirect_dns,
            "redirect-dns",
            &["REDIRECT_DNS", "ISTIO_META_DNS_CAPTURE"],
            env,
        ))?;
        let all = boolean(Setting::find(
            &self.capture_all_dns,
            "capture-all-dns",
            &["CAPTURE_ALL_DNS"],
            env,
        ))?;
        match (redirect, all) {
            (false, _) => return Ok(Dns::Off),
            (true, true) => return Ok(Dns::All),
            (true, false) => {}
        }
        let path = self.resolv_conf.as_deref().unwrap_or(RESOLV_CONF);
        let servers = servers_of(path.as_ref()).map_err(|reason| OptionError::File {
            origin: "--resolv-conf".to_owned(),
            path: path.to_owned(),
            reason,
        })?;
        if servers.is_empty() {
            tracing::warn!("{path} names no DNS server: DNS is not captured");
            return Ok(Dns::Off);
        }
        Ok(Dns::Servers(servers))
    }

    fn interfaces(&self, env: Env<'_>, policy: &mut Policy) -> Result<(), OptionError> {
        let list = |setting: Option<Setting>| {
            setting.map_or(Ok(Vec::new()), |setting| {
                setting.read(INTERFACES, interface_list)
            })
        };
        policy.exclude_interfaces = list(Setting::find(
            &self.istio_exclude_interfaces,
            "istio-exclude-interfaces",
            &["ISTIO_EXCLUDE_INTERFACES"],
            env,
        ))?;
        let virtual_interfaces = self.virtual_interfaces_setting(env);
        policy.virtual_interfaces = list(virtual_interfaces.clone())?;
        match (virtual_interfaces, policy.mode) {
            (Some(setting), Mode::Tproxy { .. }) if !policy.virtual_interfaces.is_empty() => {
                Err(setting.not_with(WITH_TPROXY))
            }
            _ => Ok(()),
        }
    }

    fn virtual_interfaces_setting(&self, env: Env<'_>) -> Option<Setting> {
        Setting::find(
            &self.kube_virt_interfaces,
            "kube-virt-interfaces",
            &["KUBE_VIRT_INTERFACES"],
            env,
        )
    }
}

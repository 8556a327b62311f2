//! Values of any bytes: what the programs and the loader make of them is defined, and leads back.

mod fuzz {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use bytemuck::{Pod, pod_read_unaligned};
    use proptest::prelude::*;
    use redirect_common::address::Address;
    use redirect_common::connection::{
        Original, SPARE_PORT_FIRST, STEERED_PORT_FIRST, STEERED_PORT_TRIES, is_steered_port,
    };
    use redirect_common::decide::{self, Inbound};
    use redirect_common::listener::listener_serves;
    use redirect_common::lists::{List, ListKey, Lists};
    use redirect_common::log::{Decision, NO_OWNER};
    use redirect_common::pod::{IdRange, PodConfig};
    use redirect_common::verdict::{Action, COUNTERS, Rule};
    use redirect_common::virtual_machine::Interface;

    /// As many cases as `PROPTEST_CASES` says.
    fn config() -> ProptestConfig {
        ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::default()
        }
    }

    /// Lists that hold whatever hashes to an even number.
    struct Arbitrary(u64);

    impl Lists for Arbitrary {
        fn has_port(&self, list: List, port: u16) -> bool {
            (self.0 >> (list as u32 + u32::from(port % 8))) & 1 == 0
        }

        fn has_address(&self, list: List, address: &Address) -> bool {
            (self.0 >> (list as u32 + (address.words_be[3] >> 24) % 8)) & 1 == 0
        }
    }

    /// A value of any bytes; or of few that are not 0, as in numbers that are small.
    fn any_bytes<T: Pod + std::fmt::Debug>() -> impl Strategy<Value = T> {
        any::<(u64, bool)>().prop_map(|(seed, small)| {
            let mut state = seed;
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                // SplitMix64.
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                let [byte, choice, ..] = (mixed ^ mixed >> 31).to_ne_bytes();
                match choice % 8 {
                    0..6 if small => 0,
                    6 if small => byte % 4,
                    _ => byte,
                }
            })
            .take(size_of::<T>())
            .collect();
            pod_read_unaligned(&bytes)
        })
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<IpAddr>(),
            any::<[u8; 4]>().prop_map(|v4| Ipv4Addr::from(v4).to_ipv6_mapped().into()),
            any::<[u8; 3]>().prop_map(|[a, b, c]| IpAddr::from([127, a, b, c])),
            (0..128_u32).prop_map(|bit| IpAddr::from((1_u128 << bit).to_be_bytes())),
            any::<u8>().prop_map(|low| IpAddr::from(u128::from(low).to_be_bytes())),
        ]
    }

    proptest! {
        #![proptest_config(config())]

        #[test]
        fn any_address_leads_back_and_is_classed_as_the_standard_library_does(ip in any_address(), words: [u32; 4]) {
            let address = Address::from(ip);
            let ip = ip.to_canonical();
            prop_assert_eq!(IpAddr::from(address), ip);
            prop_assert_eq!(address.is_v4(), ip.is_ipv4());
            prop_assert_eq!(address.is_loopback(), ip.is_loopback());
            prop_assert_eq!(address.is_unspecified(), ip.is_unspecified());
            let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            prop_assert_eq!(address.is_link_local(), link_local);
            prop_assert_eq!(address.loopback_of_family().is_v4(), ip.is_ipv4());
            prop_assert!(address.loopback_of_family().is_loopback());
            let raw = Address::from_words_be(words);
            prop_assert_eq!(Address::from(IpAddr::from(raw)), raw);
        }

        #[test]
        fn any_settings_decide_about_any_connection(pod in any_bytes::<PodConfig>(), record in any_bytes::<Decision>(), lists: u64) {
            // The verifier proves it of the programs; the loader's tests and tools run the same code.
            let lists = Arbitrary(lists);
            let connection = record.connection();
            prop_assert_eq!(connection.owner.is_none(), record.uid == NO_OWNER);
            let to_pod = Inbound { destination: record.destination, port: record.port, interface: record.interface };
            let rules = [
                (decide::outbound(&pod, &lists, &connection), "outbound-"),
                (decide::inbound(&pod, &lists, &to_pod), "inbound-"),
                (decide::machine(&pod, &lists, &record.destination), "machine-"),
            ];
            for (rule, direction) in rules {
                prop_assert!(rule.label().starts_with(direction), "{:?}", rule);
                prop_assert!((rule as usize) < COUNTERS);
                prop_assert_eq!(Rule::from_number(rule as u32), Some(rule));
            }
            prop_assert!(rules[1].0.action() != Action::CaptureOutbound);
        }

        #[test]
        fn any_destination_has_a_steered_port_that_stands_for_destinations(original in any_bytes::<Original>(), attempt in 0..STEERED_PORT_TRIES) {
            let port = original.steered_port(attempt);
            prop_assert!((STEERED_PORT_FIRST..SPARE_PORT_FIRST).contains(&port));
            prop_assert!(is_steered_port(port));
            prop_assert_eq!(port, original.steered_port(attempt));
        }

        #[test]
        fn any_id_range_has_its_ids(a: u32, b: u32, id: u32) {
            let range = IdRange { first: a.min(b), last: a.max(b) };
            for id in [id, a, b, range.first.wrapping_sub(1), range.last.wrapping_add(1)] {
                prop_assert_eq!(range.contains(id), (range.first..=range.last).contains(&id), "{}", id);
            }
        }

        #[test]
        fn any_two_keys_of_lists_are_different(a: (u64, u16), b: (u64, u16), ip: IpAddr) {
            let port = |(policy, port)| ListKey::port(policy, List::IncludeOutboundPorts, port);
            prop_assert_eq!(port(a) == port(b), a == b);
            let address = |policy| ListKey::address(policy, List::ExcludeOutboundCidrs, ip.into());
            prop_assert_eq!(address(a.0) == address(b.0), a.0 == b.0);
            prop_assert_ne!(address(a.0), port(a));
        }

        #[test]
        fn any_listener_serves_its_own_address_and_family(bound in any_address(), target in any_address()) {
            let (bound, target) = (Address::from(bound), Address::from(target));
            prop_assert!(listener_serves(&bound, &bound));
            let wildcards = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)];
            let [v4, v6] = wildcards.map(|any| listener_serves(&any.into(), &target));
            prop_assert_eq!((v4, v6), (target.is_v4(), true));
            if listener_serves(&bound, &target) && bound != target && !bound.is_unspecified() {
                prop_assert_eq!(bound.is_v4(), target.is_v4());
                prop_assert!(!bound.is_loopback() && !target.is_loopback());
            }
        }

        #[test]
        fn any_interface_gives_an_address_of_the_family(v4: Ipv4Addr, v6: Ipv6Addr, wanted in any_address()) {
            let interface = Interface { ipv4: IpAddr::from(v4).into(), ipv6: IpAddr::from(v6).into(), ..Interface::default() };
            let wanted = Address::from(wanted);
            if let Some(address) = interface.address_for(&wanted) && !v6.to_canonical().is_ipv4() {
                prop_assert_eq!(address.is_v4(), wanted.is_v4());
            }
        }
    }
}

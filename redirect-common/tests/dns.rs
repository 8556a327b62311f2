//! Slot addresses: which they are, and what they lead back to.

use std::collections::HashMap;
use std::net::IpAddr;

use proptest::prelude::*;
use redirect_common::address::Address;
use redirect_common::dns::{DNS_SLOT_TRIES, DNS_SLOTS_PER_POD, DnsSlot, slot_of};

fn slot(server: IpAddr, client: IpAddr) -> DnsSlot {
    DnsSlot {
        server: server.into(),
        client: client.into(),
    }
}

mod fuzz {
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn slot_address_is_of_the_servers_family_and_leads_back(server: IpAddr, client: IpAddr, attempt in 0..DNS_SLOT_TRIES) {
            let slot = slot(server, client);
            let number = slot.number(attempt);
            prop_assert!(number < DNS_SLOTS_PER_POD);
            let address = slot.address(number);
            prop_assert_eq!(address.is_v4(), slot.server.is_v4());
            prop_assert_eq!(slot_of(&address), Some(number));
        }

        #[test]
        fn other_addresses_are_no_slots(address: IpAddr) {
            let in_range = match address.to_canonical() {
                IpAddr::V4(v4) => v4.to_bits().wrapping_sub(0x7f80_0000) < DNS_SLOTS_PER_POD,
                IpAddr::V6(v6) => v6.to_bits().wrapping_sub(0x0100 << 112) < u128::from(DNS_SLOTS_PER_POD),
            };
            prop_assert_eq!(slot_of(&Address::from(address)).is_some(), in_range);
        }
    }
}

#[test]
fn edges_of_the_ranges_are_exact() {
    let of = |text: &str| slot_of(&text.parse::<IpAddr>().expect("an address").into());
    assert_eq!(of("127.128.0.0"), Some(0));
    assert_eq!(of("127.128.15.255"), Some(4095));
    assert_eq!(of("127.128.16.0"), None);
    assert_eq!(of("127.127.255.255"), None);
    assert_eq!(of("::ffff:127.128.0.7"), Some(7));
    assert_eq!(of("100::"), Some(0));
    assert_eq!(of("100::fff"), Some(4095));
    assert_eq!(of("100::1000"), None);
    assert_eq!(of("100::1:0:7"), None);
    assert_eq!(of("100:0:0:1::7"), None);
}

#[test]
fn servers_that_are_neighbours_spread_over_the_slots() {
    let client: IpAddr = [127, 0, 0, 1].into();
    let mut used = HashMap::new();
    for last in 0..=255_u8 {
        let server: IpAddr = [10, 96, 0, last].into();
        *used.entry(slot(server, client).number(0)).or_insert(0) += 1;
    }
    // 256 thrown into 4096 slots at random: about 248 different ones.
    assert!(used.len() > 220, "{} slots", used.len());
}

//! The kernel's socket addresses.

use redirect_common::address::Address;

use crate::ctx::{AF_INET, AF_INET6};

/// `struct sockaddr_in`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SockaddrIn {
    family: u16,
    port_be: u16,
    address_be: u32,
    zero: [u32; 2],
}

impl SockaddrIn {
    /// Of an IPv4 address and a port in host order.
    #[inline(always)]
    pub const fn new(address: &Address, port: u16) -> Self {
        Self {
            family: AF_INET as u16,
            port_be: port.to_be(),
            address_be: address.v4_be(),
            zero: [0; 2],
        }
    }
}

/// `struct sockaddr_in6`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SockaddrIn6 {
    family: u16,
    port_be: u16,
    flow_info: u32,
    address_be: [u32; 4],
    scope_id: u32,
}

impl SockaddrIn6 {
    /// Of an address, IPv4 as IPv4-mapped, and a port in host order.
    #[inline(always)]
    pub const fn new(address: &Address, port: u16) -> Self {
        Self {
            family: AF_INET6 as u16,
            port_be: port.to_be(),
            flow_info: 0,
            address_be: address.words_be,
            scope_id: 0,
        }
    }
}

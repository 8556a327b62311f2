//! One blocking netlink request at a time.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_sys::{Socket, SocketAddr};

/// How often a dump is repeated when the table changes under it.
const DUMP_ATTEMPTS: u32 = 5;

/// A netlink socket of the namespace of the thread that opened it.
pub(crate) struct Netlink(Socket);

impl Netlink {
    /// Opens a socket of the family (`NETLINK_ROUTE`, …) in the calling thread's network namespace.
    pub(crate) fn open(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// What is collected from the messages of a dump, of one consistent state of the table when the kernel allows it.
    /// `collect` decides what is kept: whoever owns the table may have filled it.
    pub(crate) fn dump<M, C>(
        &self,
        request: &M,
        mut collect: impl FnMut(&mut C, M),
    ) -> io::Result<C>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
        C: Default,
    {
        let mut collected = C::default();
        for _ in 0..DUMP_ATTEMPTS {
            collected = C::default();
            let interrupted = self.exchange(request, NLM_F_DUMP, |message| {
                collect(&mut collected, message);
            })?;
            if !interrupted {
                break;
            }
        }
        Ok(collected)
    }

    /// The message that answers a single request.
    pub(crate) fn ask<M>(&self, request: &M) -> io::Result<M>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        let mut answer = None;
        self.exchange(request, 0, |message| answer = Some(message))?;
        answer.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Asks for a change and waits until it is made. `flags` must not have the bits of a dump, `NLM_F_ROOT` and `NLM_F_MATCH`.
    pub(crate) fn change<M>(&self, request: &M, flags: u16) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        self.exchange(request, NLM_F_ACK | flags, |_| ()).map(drop)
    }

    /// Gives every answer to `take`. True if the table changed under a dump.
    fn exchange<M>(&self, request: &M, flags: u16, mut take: impl FnMut(M)) -> io::Result<bool>
    where
        M: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message =
            NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request.clone()));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;

        let mut interrupted = false;
        loop {
            let (datagram, _) = self.0.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<M>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                // Messages are padded to four bytes; the last one may lack its padding.
                let length = (message.header.length as usize).next_multiple_of(4);
                match message.payload {
                    NetlinkPayload::InnerMessage(answer) => take(answer),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(interrupted),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    _ => {}
                }
                rest = rest.get(length..).unwrap_or_default();
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP {
                return Ok(interrupted);
            }
        }
    }
}

/// The namespace's own address in an answer, and all of its flags.
pub(crate) fn own_address(message: &AddressMessage) -> Option<(IpAddr, AddressFlags)> {
    let (mut local, mut peer) = (None, None);
    // The header has the low eight flags, the attribute all of them.
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            AddressAttribute::Flags(all) => flags |= *all,
            _ => {}
        }
    }
    // On a point-to-point interface IFA_ADDRESS is the other end.
    Some((local.or(peer)?, flags))
}

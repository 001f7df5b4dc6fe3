//! Map keys. Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`,
//! because an `AF_INET6` socket with a mapped address speaks IPv4 on the wire.

/// One established connection, seen from the workload: both directions of the
/// connection have this same key.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The workload's address.
    pub local: [u8; 16],
    /// The peer's address.
    pub remote: [u8; 16],
    /// The workload's port, network order.
    pub local_port_be: [u8; 2],
    /// The peer's port, network order.
    pub remote_port_be: [u8; 2],
}

/// One listening address and port.
///
/// A wildcard keeps its family: `::` is every IPv6 address, [`ANY_V4`] every
/// IPv4 one. A dual-stack wildcard listener is therefore two keys, and the
/// programs never have to know which kind of socket it was.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// The bound address, or a wildcard.
    pub local: [u8; 16],
    /// The port, network order.
    pub port_be: [u8; 2],
    /// Always zero: map keys are compared with their padding.
    pub reserved: [u8; 2],
}

/// Every IPv6 address.
pub const ANY_V6: [u8; 16] = [0; 16];
/// Every IPv4 address: `::ffff:0.0.0.0`.
pub const ANY_V4: [u8; 16] = mapped([0; 4]);

const _: () = assert!(size_of::<FlowKey>() == 36 && size_of::<ListenerKey>() == 20);

/// The 16-byte form of an IPv4 address.
#[inline(always)]
#[must_use]
pub const fn mapped(ipv4: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = ipv4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// The same, in words as they lie in memory.
#[inline(always)]
#[must_use]
pub const fn mapped_words(ipv4: u32) -> [u32; 4] {
    [0, 0, u32::from_be(0xffff), ipv4]
}

/// Whether the address is an IPv4 one in its 16-byte form.
#[inline(always)]
#[must_use]
pub const fn is_mapped(address: &[u8; 16]) -> bool {
    matches!(address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..])
}

impl FlowKey {
    /// The key of a packet: its addresses, and its ports as they stand in the
    /// TCP header, all in words as they lie in memory. Whole words, because a
    /// BPF program copies unaligned addresses byte by byte.
    #[inline(always)]
    #[must_use]
    pub const fn of_words(local: [u32; 4], remote: [u32; 4], local_remote_port: u32) -> Self {
        let [l0, l1, l2, l3] = local;
        let [r0, r1, r2, r3] = remote;
        let words = [l0, l1, l2, l3, r0, r1, r2, r3, local_remote_port];
        // SAFETY: `FlowKey` is `repr(C)` bytes of the same size (asserted
        // above) and of no greater alignment, and every bit pattern is one.
        unsafe { core::mem::transmute::<[u32; 9], Self>(words) }
    }

    /// The listener that would have accepted this flow under its own address.
    #[inline(always)]
    #[must_use]
    pub const fn listener(&self) -> ListenerKey {
        ListenerKey::new(self.local, self.local_port_be)
    }

    /// The wildcard listener that would have accepted this flow.
    #[inline(always)]
    #[must_use]
    pub const fn wildcard_listener(&self) -> ListenerKey {
        let any = if is_mapped(&self.local) {
            ANY_V4
        } else {
            ANY_V6
        };
        ListenerKey::new(any, self.local_port_be)
    }
}

impl ListenerKey {
    /// A key with its padding cleared.
    #[inline(always)]
    #[must_use]
    pub const fn new(local: [u8; 16], port_be: [u8; 2]) -> Self {
        Self {
            local,
            port_be,
            reserved: [0; 2],
        }
    }
}

// SAFETY: `repr(C)` of byte arrays whose sizes add up to the asserted size, so
// there is no padding, and every bit pattern is a value.
#[cfg(feature = "user")]
unsafe impl aya::Pod for FlowKey {}
// SAFETY: as for `FlowKey`.
#[cfg(feature = "user")]
unsafe impl aya::Pod for ListenerKey {}

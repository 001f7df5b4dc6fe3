//! Map keys. Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`,
//! because an `AF_INET6` socket with a mapped address speaks IPv4 on the wire.

/// One established connection, seen from the workload: both directions of the
/// connection have this same key.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// Whether the address is an IPv4 one in its 16-byte form.
#[inline(always)]
#[must_use]
pub const fn is_mapped(address: &[u8; 16]) -> bool {
    matches!(address, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, ..])
}

impl FlowKey {
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

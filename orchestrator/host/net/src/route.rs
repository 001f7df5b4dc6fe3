//! Interfaces and addresses through rtnetlink, and the steps of moving one.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use migrate_core::facts::AddressFacts;
use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::RouteMessageBuilder;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::announce;
use crate::error::NetError;
use crate::rules;

/// The kernel answers from memory; longer than this it does not answer at all.
const ANSWER_LIMIT_MS: u64 = 5000;

/// TEST-NET-1 and the documentation prefix (RFC 5737, RFC 3849): they belong to
/// nobody, so the route to them is the default route.
const NOWHERE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const NOWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Peers whose next hop is looked up in advance; most have the same few.
pub const NEIGHBOURS_MAX: usize = 4096;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Link-layer address, of Ethernet interfaces only.
    pub mac: Option<[u8; 6]>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Its frames have Ethernet headers.
    pub ethernet: bool,
    /// Neighbours are found by ARP and Neighbor Discovery.
    pub arp: bool,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Prefix length.
    pub prefix_len: u8,
    /// Index of its interface.
    pub ifindex: u32,
    /// Name of its interface.
    pub interface: String,
    /// IPv4: another address of the same subnet was there first.
    pub secondary: bool,
    /// Reaches beyond its link (`RT_SCOPE_UNIVERSE` or site).
    pub global: bool,
    /// Given out by a router or a DHCP server, or temporary: has a lifetime.
    pub dynamic: bool,
    /// No longer used for new connections.
    pub deprecated: bool,
    /// Duplicate address detection still runs.
    pub tentative: bool,
    /// IPv4 label, which is the interface's name unless someone chose another.
    pub label: Option<String>,
}

/// Where an address goes on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// The address.
    pub ip: IpAddr,
    /// Prefix length, as on the source.
    pub prefix_len: u8,
    /// Index of the interface.
    pub ifindex: u32,
    /// Name of the interface.
    pub interface: String,
    /// Link-layer address to announce; none where nobody asks for one.
    pub mac: Option<[u8; 6]>,
}

/// An address that has been added here and not been announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Staged {
    /// Where.
    pub placement: Placement,
    /// It was on that very interface before; [`Net::unstage`] leaves it there.
    pub was_there: bool,
}

/// An address that has been removed, with all that brings it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withdrawn {
    /// The address.
    pub ip: IpAddr,
    /// Index of the interface that it was on.
    pub ifindex: u32,
    /// Name of that interface.
    pub interface: String,
    /// The kernel's record of the address, as in `RTM_NEWADDR`.
    record: Vec<u8>,
    /// Routes that go with it, as in `RTM_NEWROUTE`.
    routes: Vec<Vec<u8>>,
}

/// A conversation with the kernel about interfaces, addresses and routes.
#[derive(Debug, Clone)]
pub struct Net {
    handle: rtnetlink::Handle,
    _connection: Arc<Connection>,
}

/// Ends the task with the last [`Net`].
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Net {
    /// Opens the conversation, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// No netlink socket could be had.
    pub async fn open() -> Result<Self, NetError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(|source| NetError::Open { source })?;
        Ok(Self {
            handle,
            _connection: Arc::new(Connection(tokio::spawn(connection))),
        })
    }

    /// Every interface.
    ///
    /// # Errors
    ///
    /// The kernel does not list them.
    pub async fn interfaces(&self) -> Result<Vec<Interface>, NetError> {
        let links: Vec<LinkMessage> = list(
            "interfaces",
            self.handle.link().get().execute().try_collect(),
        )
        .await?;
        Ok(links.iter().filter_map(interface).collect())
    }

    /// Every address of every interface, in the kernel's order: of the IPv4
    /// addresses of an interface, primaries come first.
    ///
    /// # Errors
    ///
    /// The kernel does not list them.
    pub async fn addresses(&self) -> Result<Vec<Address>, NetError> {
        let interfaces = self.interfaces().await?;
        Ok(self
            .address_messages()
            .await?
            .iter()
            .filter_map(|message| address(message, &interfaces))
            .collect())
    }

    async fn address_messages(&self) -> Result<Vec<AddressMessage>, NetError> {
        let get = self.handle.address().get();
        list("addresses", get.execute().try_collect()).await
    }

    /// The addresses from which this host speaks to the world when nobody
    /// binds one: the sources of its default routes.
    ///
    /// # Errors
    ///
    /// The kernel does not answer.
    pub async fn default_sources(&self) -> Result<Vec<IpAddr>, NetError> {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(NOWHERE_V4, 32)
            .build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(NOWHERE_V6, 128)
            .build();
        let mut sources = Vec::new();
        for question in [v4, v6] {
            let mut answers = Box::pin(self.handle.route().get(question).execute());
            let answer = within("look up the default route", answers.next()).await?;
            // An error says that there is no default route.
            let Some(Ok(route)) = answer else { continue };
            if !matches!(route.header.kind, RouteType::Unicast) {
                continue;
            }
            sources.extend(route.attributes.iter().find_map(|a| match a {
                RouteAttribute::PrefSource(source) => plain_ip(source),
                _ => None,
            }));
        }
        Ok(sources)
    }

    /// Makes the kernel ask for the link-layer address of each next hop towards
    /// `peers` over one of `interfaces`, with an address of this host's own,
    /// and keep the answer. What is already known is confirmed.
    ///
    /// A restored socket sends at once. A packet for which no link-layer
    /// address is known makes the kernel ask in the packet's name; while that
    /// address is staged the question is not let out, and the next one comes a
    /// second later (`retrans_time_ms`). Nothing depends on this but time, so
    /// it does not fail; at most [`NEIGHBOURS_MAX`] peers are looked at.
    pub async fn find_neighbours(&self, peers: &BTreeSet<IpAddr>, interfaces: &[u32]) {
        let mut hops = BTreeSet::new();
        for &peer in peers.iter().take(NEIGHBOURS_MAX) {
            match self.next_hop(peer).await {
                Ok(Some((ifindex, hop))) if interfaces.contains(&ifindex) => {
                    hops.insert((ifindex, hop));
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, %peer, "no next hop"),
            }
        }
        for (ifindex, hop) in hops {
            let request = self
                .handle
                .neighbours()
                .add(ifindex, hop)
                .state(NeighbourState::None)
                .flags(NeighbourFlags::Use)
                .replace()
                .execute();
            match within("ask for a neighbour", request).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, %hop, "no question for a neighbour"),
                Err(error) => tracing::debug!(%error, %hop, "no question for a neighbour"),
            }
        }
    }

    /// The interface and the neighbour that a packet for `peer` goes to.
    async fn next_hop(&self, peer: IpAddr) -> Result<Option<(u32, IpAddr)>, NetError> {
        let question = match peer {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(ip, 32)
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(ip, 128)
                .build(),
        };
        let mut answers = Box::pin(self.handle.route().get(question).execute());
        let Some(Ok(route)) = within("look up a route", answers.next()).await? else {
            return Ok(None);
        };
        let mut ifindex = None;
        let mut hop = peer;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => ifindex = Some(*index),
                RouteAttribute::Gateway(gateway) => hop = plain_ip(gateway).unwrap_or(hop),
                _ => {}
            }
        }
        Ok(ifindex.map(|ifindex| (ifindex, hop)))
    }

    /// Which interface of this host takes the address: one that has an address
    /// whose subnet contains it, by preference the one named as on the source.
    ///
    /// # Errors
    ///
    /// The address is here already, or no interface fits.
    pub async fn place(&self, address: &AddressFacts) -> Result<Placement, NetError> {
        let interfaces = self.interfaces().await?;
        let addresses = self.addresses().await?;
        rules::place(address, &interfaces, &addresses)
    }

    /// Adds the address without telling anybody, and without changing how this
    /// host reaches its network: no prefix route, no duplicate address
    /// detection. Doing it twice is doing it once.
    ///
    /// From here on the kernel answers ARP and Neighbor Solicitations for the
    /// address: the caller's gate must already drop them.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or the address is on another interface.
    pub async fn stage(&self, placement: &Placement) -> Result<Staged, NetError> {
        let Placement {
            ip,
            prefix_len,
            ifindex,
            ..
        } = *placement;
        let mut request = self.handle.address().add(ifindex, ip, prefix_len);
        let message = request.message_mut();
        // The host's own address serves the subnet's broadcast address.
        message
            .attributes
            .retain(|a| !matches!(a, AddressAttribute::Broadcast(_)));
        let mut flags = AddressFlags::Noprefixroute;
        if ip.is_ipv6() {
            flags |= AddressFlags::Nodad;
        }
        message.attributes.push(AddressAttribute::Flags(flags));
        let staged = |was_there| Staged {
            placement: placement.clone(),
            was_there,
        };
        match self.change("add an address", request.execute()).await? {
            Ok(()) => Ok(staged(false)),
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(staged(true)),
            Err(source) => Err(NetError::Add {
                ip,
                interface: placement.interface.clone(),
                source,
            }),
        }
    }

    /// Undoes [`Net::stage`]. Doing it twice is doing it once.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub async fn unstage(&self, staged: &Staged) -> Result<(), NetError> {
        let Placement {
            ip,
            ifindex,
            ref interface,
            ..
        } = staged.placement;
        if staged.was_there {
            return Ok(());
        }
        let here = self.address_messages().await?;
        match here
            .into_iter()
            .find(|m| m.header.index == ifindex && local_ip(m) == Some(ip))
        {
            Some(message) => self.delete(message, ip, interface).await,
            None => Ok(()),
        }
    }

    /// Where an address of this host is, to announce it; `None` when it is not
    /// here.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub async fn placed(&self, ip: IpAddr) -> Result<Option<Placement>, NetError> {
        let addresses = self.addresses().await?;
        let Some(here) = addresses.iter().find(|address| address.ip == ip) else {
            return Ok(None);
        };
        let interfaces = self.interfaces().await?;
        let on = interfaces.iter().find(|on| on.index == here.ifindex);
        Ok(on.map(|interface| Placement {
            ip,
            prefix_len: here.prefix_len,
            ifindex: interface.index,
            interface: interface.name.clone(),
            mac: interface.mac.filter(|_| interface.arp),
        }))
    }

    /// What [`Net::withdraw`] would remember at this moment, for a journal that
    /// is written before; changes nothing.
    ///
    /// # Errors
    ///
    /// The address is not here.
    pub async fn plan_withdrawal(&self, address: &AddressFacts) -> Result<Withdrawn, NetError> {
        let addresses = self.addresses().await?;
        let found = rules::find(&addresses, address.ip, &address.interface)
            .ok_or(NetError::NotHere { ip: address.ip })?;
        Ok(self.withdrawal(found, &addresses).await?.0)
    }

    /// The record of an address and the message that removes it.
    async fn withdrawal(
        &self,
        found: &Address,
        addresses: &[Address],
    ) -> Result<(Withdrawn, AddressMessage), NetError> {
        let ip = found.ip;
        let message = self
            .address_messages()
            .await?
            .into_iter()
            .find(|m| m.header.index == found.ifindex && local_ip(m) == Some(ip))
            .ok_or(NetError::NotHere { ip })?;
        let last_on_interface = !addresses
            .iter()
            .any(|a| a.ifindex == found.ifindex && a.ip.is_ipv4() && a.ip != ip);
        let routes = self
            .dependent_routes(ip, found.ifindex, last_on_interface)
            .await?;
        let withdrawn = Withdrawn {
            ip,
            ifindex: found.ifindex,
            interface: found.interface.clone(),
            record: emit(&message),
            routes: routes.iter().map(emit).collect(),
        };
        Ok((withdrawn, message))
    }

    /// Removes the address, and remembers its label, flags, lifetimes and the
    /// routes that go with it.
    ///
    /// # Errors
    ///
    /// The address is not here; or it is a primary IPv4 address and the kernel
    /// would remove its secondaries as well (withdraw those first); or the
    /// kernel refuses.
    pub async fn withdraw(&self, address: &AddressFacts) -> Result<Withdrawn, NetError> {
        let ip = address.ip;
        let addresses = self.addresses().await?;
        let found = rules::find(&addresses, ip, &address.interface)
            .ok_or(NetError::NotHere { ip })?
            .clone();
        let others = rules::dependents(&found, &addresses);
        if !others.is_empty() && !promotes_secondaries(&found.interface) {
            return Err(NetError::TakesOthers {
                ip,
                interface: found.interface,
                others: rules::join(&others),
            });
        }
        let (withdrawn, message) = self.withdrawal(&found, &addresses).await?;
        self.delete(message, ip, &found.interface).await?;
        Ok(withdrawn)
    }

    /// Puts a withdrawn address back as it was. Doing it twice is doing it once.
    ///
    /// A primary address whose secondaries the kernel promoted comes back as
    /// their secondary; nothing else tells it from before.
    ///
    /// # Errors
    ///
    /// The kernel refuses. When only a route is missing, the address is back.
    pub async fn restore(&self, withdrawn: &Withdrawn) -> Result<(), NetError> {
        let ip = withdrawn.ip;
        let interface = &withdrawn.interface;
        let record = || NetError::Record { ip };
        let mut message = AddressMessage::parse(&withdrawn.record[..]).map_err(|_| record())?;
        message.header.index = withdrawn.ifindex;
        if ip.is_ipv6() {
            // It was ours a moment ago: detection would only make it late.
            for attribute in &mut message.attributes {
                if let AddressAttribute::Flags(flags) = attribute {
                    *flags |= AddressFlags::Nodad;
                    flags.remove(AddressFlags::Tentative | AddressFlags::Dadfailed);
                }
            }
        }
        let mut request =
            self.handle
                .address()
                .add(withdrawn.ifindex, ip, message.header.prefix_len);
        *request.message_mut() = message;
        match self.change("add an address", request.execute()).await? {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(source) => {
                return Err(NetError::Add {
                    ip,
                    interface: interface.clone(),
                    source,
                });
            }
        }
        for route in &withdrawn.routes {
            let route = RouteMessage::parse(&route[..]).map_err(|_| record())?;
            let mut request = self.handle.route().add(route);
            if ip.is_ipv6() {
                // The kernel kept the route and took only the source off it.
                request = request.replace();
            }
            match self.change("add a route", request.execute()).await? {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
                Err(source) => {
                    return Err(NetError::RestoreRoute {
                        ip,
                        interface: interface.clone(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Tells the network that these addresses are here, at once and once. The
    /// frames pass a gate that is still closed on egress; see
    /// [`Net::announce_again`] for the repetition.
    ///
    /// # Errors
    ///
    /// A frame was not sent; the other addresses are announced all the same.
    pub async fn announce(&self, placements: &[Placement]) -> Result<(), NetError> {
        announce(placements)
    }

    /// Repeats [`Net::announce`] after [`announce::FOLLOW_UPS_MS`]; the caller
    /// spawns it beside what is more urgent.
    pub fn announce_again(
        &self,
        placements: Vec<Placement>,
    ) -> impl Future<Output = Result<(), NetError>> + Send + 'static + use<> {
        async move {
            let mut waited_ms = 0;
            let mut last = Ok(());
            for at_ms in announce::FOLLOW_UPS_MS {
                tokio::time::sleep(Duration::from_millis(at_ms - waited_ms)).await;
                waited_ms = at_ms;
                last = announce(&placements);
            }
            last
        }
    }

    async fn delete(
        &self,
        mut message: AddressMessage,
        ip: IpAddr,
        interface: &str,
    ) -> Result<(), NetError> {
        message.attributes.retain(|a| {
            matches!(
                a,
                AddressAttribute::Address(_)
                    | AddressAttribute::Local(_)
                    | AddressAttribute::Label(_)
            )
        });
        let request = self.handle.address().del(message);
        match self.change("remove an address", request.execute()).await? {
            Ok(()) => Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            Err(source) => Err(NetError::Remove {
                ip,
                interface: interface.to_owned(),
                source,
            }),
        }
    }

    /// The routes that the kernel drops (IPv4) or changes (IPv6) with the address:
    /// those that have it as their source, and all of the interface's with its
    /// last IPv4 address.
    async fn dependent_routes(
        &self,
        ip: IpAddr,
        ifindex: u32,
        last_on_interface: bool,
    ) -> Result<Vec<RouteMessage>, NetError> {
        let mut question = RouteMessage::default();
        question.header.address_family = if ip.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let get = self.handle.route().get(question);
        let all: Vec<RouteMessage> = list("routes", get.execute().try_collect()).await?;
        let mut routes: Vec<RouteMessage> = all
            .into_iter()
            // The kernel makes its own again.
            .filter(|route| route.header.protocol != RouteProtocol::Kernel)
            .filter(|route| {
                route.attributes.iter().any(|a| match a {
                    RouteAttribute::PrefSource(source) => plain_ip(source) == Some(ip),
                    RouteAttribute::Oif(index) => {
                        last_on_interface && ip.is_ipv4() && *index == ifindex
                    }
                    _ => false,
                })
            })
            .collect();
        for route in &mut routes {
            // Statistics, which a new route begins anew.
            route
                .attributes
                .retain(|a| !matches!(a, RouteAttribute::CacheInfo(_)));
        }
        // A gateway can only be named once there is a route to it.
        routes.sort_by_key(|route| {
            route
                .attributes
                .iter()
                .any(|a| matches!(a, RouteAttribute::Gateway(_)))
        });
        Ok(routes)
    }

    /// Runs a request that changes something; the inner result is the kernel's answer.
    async fn change(
        &self,
        what: &'static str,
        request: impl Future<Output = Result<(), rtnetlink::Error>>,
    ) -> Result<io::Result<()>, NetError> {
        Ok(within(what, request).await?.map_err(kernel_error))
    }
}

/// Whether the kernel keeps an interface's secondaries when their primary goes.
pub(crate) fn promotes_secondaries(interface: &str) -> bool {
    ["all", interface].iter().any(|name| {
        std::fs::read_to_string(format!(
            "/proc/sys/net/ipv4/conf/{name}/promote_secondaries"
        ))
        .is_ok_and(|text| text.trim() != "0")
    })
}

async fn within<T>(what: &'static str, answer: impl Future<Output = T>) -> Result<T, NetError> {
    tokio::time::timeout(Duration::from_millis(ANSWER_LIMIT_MS), answer)
        .await
        .map_err(|_| NetError::TimedOut {
            what,
            limit_ms: ANSWER_LIMIT_MS,
        })
}

async fn list<T>(
    what: &'static str,
    answer: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, NetError> {
    within(what, answer).await?.map_err(|e| NetError::List {
        what,
        source: kernel_error(e),
    })
}

fn kernel_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn emit(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}

fn plain_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// The host's end; on a point-to-point link `IFA_ADDRESS` is the other one.
fn local_ip(message: &AddressMessage) -> Option<IpAddr> {
    let find =
        |pick: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
    find(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    })
    .or_else(|| {
        find(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

fn interface(message: &LinkMessage) -> Option<Interface> {
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let mut out = Interface {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
        ethernet,
        arp: !flags.contains(LinkFlags::Noarp),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => out.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => out.mtu = *mtu,
            LinkAttribute::Address(bytes) if ethernet => {
                out.mac = <[u8; 6]>::try_from(&bytes[..]).ok();
            }
            _ => {}
        }
    }
    (!out.name.is_empty()).then_some(out)
}

fn address(message: &AddressMessage, interfaces: &[Interface]) -> Option<Address> {
    let ip = local_ip(message)?;
    let flags = message
        .attributes
        .iter()
        .find_map(|a| match a {
            AddressAttribute::Flags(flags) => Some(*flags),
            _ => None,
        })
        .unwrap_or_else(|| AddressFlags::from_bits_retain(message.header.flags.bits().into()));
    let ifindex = message.header.index;
    Some(Address {
        ip,
        prefix_len: message.header.prefix_len,
        ifindex,
        interface: interfaces
            .iter()
            .find(|i| i.index == ifindex)
            .map(|i| i.name.clone())?,
        // The same bit says "temporary" of an IPv6 address.
        secondary: ip.is_ipv4() && flags.contains(AddressFlags::Secondary),
        global: matches!(
            message.header.scope,
            AddressScope::Universe | AddressScope::Site
        ),
        dynamic: !flags.contains(AddressFlags::Permanent)
            || flags.contains(AddressFlags::Managetempaddr)
            || (ip.is_ipv6() && flags.contains(AddressFlags::Secondary)),
        deprecated: flags.contains(AddressFlags::Deprecated),
        tentative: flags.contains(AddressFlags::Tentative),
        label: message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Label(label) => Some(label.clone()),
            _ => None,
        }),
    })
}

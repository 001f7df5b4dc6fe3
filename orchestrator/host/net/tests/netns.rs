//! Addresses, announcements and sockets against the kernel, in network
//! namespaces of their own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use futures_util::TryStreamExt;
use migrate_core::facts::{AddressFacts, TreeFacts};
use migrate_core::preflight::{Finding, refused};
use migrate_net::{
    Net, NetError, Placement, SurveyOptions, TcpState, announcement_frames, compare, mptcp_inodes,
    survey, tcp_sockets,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkMessage, State};
use netlink_packet_route::route::RouteMessage;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

/// Runs the test in a new network namespace, on a thread that dies with it.
fn in_netns<F, T>(test: F)
where
    F: FnOnce() -> T + Send + 'static,
    T: Future<Output = ()>,
{
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP network namespace: not root");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(async {
                tokio::time::timeout(Duration::from_secs(30), test())
                    .await
                    .expect("in time");
            });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A handle of the test's own, to set things up and to look.
fn handle() -> Handle {
    let (connection, handle, _) = rtnetlink::new_connection().unwrap();
    tokio::spawn(connection);
    handle
}

async fn link(handle: &Handle, name: &str) -> LinkMessage {
    let mut links: Vec<_> = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_collect()
        .await
        .unwrap();
    links.swap_remove(0)
}

async fn index(handle: &Handle, name: &str) -> u32 {
    link(handle, name).await.header.index
}

async fn up(handle: &Handle, name: &str) -> u32 {
    let index = index(handle, name).await;
    let message = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(message).execute().await.unwrap();
    index
}

/// `lo` and a pair `eth0`, `peer0`, all up.
async fn links(handle: &Handle) -> (u32, u32) {
    up(handle, "lo").await;
    let veth = LinkVeth::new("eth0", "peer0").build();
    handle.link().add(veth).execute().await.unwrap();
    let both = (up(handle, "eth0").await, up(handle, "peer0").await);
    // Before the kernel has noticed that both ends are up it drops what is sent.
    for name in ["eth0", "peer0"] {
        while !is_up(&link(handle, name).await) {
            tokio::task::yield_now().await;
        }
    }
    both
}

fn is_up(link: &LinkMessage) -> bool {
    let mut attributes = link.attributes.iter();
    attributes.any(|a| matches!(a, LinkAttribute::OperState(State::Up)))
}

async fn add(handle: &Handle, index: u32, ip: &str, prefix_len: u8) {
    let mut request = handle.address().add(index, ip.parse().unwrap(), prefix_len);
    if ip.contains(':') {
        request
            .message_mut()
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    request.execute().await.unwrap();
}

/// Addresses without what changes by itself: lifetimes, and link-local ones,
/// which are being probed.
async fn address_records(handle: &Handle) -> Vec<AddressMessage> {
    let mut all: Vec<AddressMessage> = (handle.address().get().execute())
        .try_collect()
        .await
        .unwrap();
    all.retain(|m| m.header.scope != AddressScope::Link);
    for message in &mut all {
        (message.attributes).retain(|a| !matches!(a, AddressAttribute::CacheInfo(_)));
    }
    all
}

async fn routes(handle: &Handle) -> Vec<RouteMessage> {
    let mut question = RouteMessage::default();
    question.header.address_family = AddressFamily::Inet;
    let mut all: Vec<RouteMessage> = (handle.route().get(question).execute())
        .try_collect()
        .await
        .unwrap();
    all.sort_by_key(|route| format!("{route:?}"));
    all
}

fn facts(ip: &str, prefix_len: u8) -> AddressFacts {
    AddressFacts {
        ip: ip.parse().unwrap(),
        prefix_len,
        interface: "eth0".to_owned(),
    }
}

fn text(findings: &[Finding]) -> String {
    findings.iter().map(|f| format!("{f:?}\n")).collect()
}

#[test]
fn staging_leaves_no_other_trace_and_is_undone() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, _) = links(&handle).await;
        add(&handle, eth0, "10.77.0.12", 24).await;
        add(&handle, eth0, "fd00::12", 64).await;
        let net = Net::open().await.unwrap();
        let before = (address_records(&handle).await, routes(&handle).await.len());
        for (ip, prefix_len, is_secondary) in [
            ("10.77.0.100", 24, true),
            ("10.77.0.100", 25, false),
            ("10.77.0.100", 32, false),
            ("fd00::100", 64, false),
            ("fd00::100", 128, false),
        ] {
            let placement = net.place(&facts(ip, prefix_len)).await.unwrap();
            assert_eq!(placement.interface, "eth0");
            assert!(placement.mac.is_some());
            let staged = net.stage(&placement).await.unwrap();
            assert!(!staged.was_there);
            let again = net.stage(&placement).await.unwrap();
            assert!(again.was_there);
            net.unstage(&again).await.unwrap();

            let addresses = net.addresses().await.unwrap();
            let here = addresses
                .iter()
                .find(|a| a.ip == placement.ip)
                .expect("staged");
            assert_eq!(here.prefix_len, prefix_len);
            assert_eq!(here.secondary, is_secondary, "{ip}/{prefix_len}");
            assert!(!here.tentative && !here.dynamic);
            // Usable at once.
            TcpListener::bind((placement.ip, 0)).unwrap();
            assert!(matches!(
                net.place(&facts(ip, prefix_len)).await,
                Err(NetError::AlreadyHere { .. })
            ));

            net.unstage(&staged).await.unwrap();
            net.unstage(&staged).await.unwrap();
            let after = (address_records(&handle).await, routes(&handle).await.len());
            assert_eq!(before, after, "{ip}/{prefix_len}");
        }
    });
}

#[test]
fn a_withdrawn_address_comes_back_as_it_was() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, _) = links(&handle).await;
        add(&handle, eth0, "10.77.0.11", 24).await;
        add(&handle, eth0, "fd00::11", 64).await;
        add(&handle, eth0, "fd00::100", 64).await;
        let mut request = (handle.address()).add(eth0, "10.77.0.100".parse().unwrap(), 24);
        let attributes = &mut request.message_mut().attributes;
        attributes.retain(|a| !matches!(a, AddressAttribute::Broadcast(_)));
        attributes.push(AddressAttribute::Broadcast([10, 77, 0, 254].into()));
        attributes.push(AddressAttribute::Label("eth0:svc".to_owned()));
        request.execute().await.unwrap();
        let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix([10, 99, 0, 0].into(), 16)
            .gateway([10, 77, 0, 1].into())
            .pref_source([10, 77, 0, 100].into())
            .build();
        handle.route().add(route).execute().await.unwrap();

        let net = Net::open().await.unwrap();
        let mut before = (address_records(&handle).await, routes(&handle).await);
        for (ip, prefix_len) in [("10.77.0.100", 24), ("fd00::100", 64)] {
            let withdrawn = net.withdraw(&facts(ip, prefix_len)).await.unwrap();
            let ip: IpAddr = ip.parse().unwrap();
            assert!(!net.addresses().await.unwrap().iter().any(|a| a.ip == ip));
            assert!(matches!(
                net.withdraw(&facts(&ip.to_string(), prefix_len)).await,
                Err(NetError::NotHere { .. })
            ));
            net.restore(&withdrawn).await.unwrap();
            net.restore(&withdrawn).await.unwrap();
            let addresses = net.addresses().await.unwrap();
            assert!(addresses.iter().any(|a| a.ip == ip && !a.tentative));
        }
        let mut after = (address_records(&handle).await, routes(&handle).await);
        for records in [&mut before.0, &mut after.0] {
            records.sort_by_key(|m| format!("{:?}", m.attributes));
        }
        assert_eq!(before, after);
    });
}

#[test]
fn a_primary_does_not_take_its_secondaries_along() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, _) = links(&handle).await;
        add(&handle, eth0, "10.77.0.11", 24).await;
        add(&handle, eth0, "10.77.0.100", 24).await;
        let sysctl = "/proc/sys/net/ipv4/conf/eth0/promote_secondaries";
        std::fs::write("/proc/sys/net/ipv4/conf/all/promote_secondaries", "0").unwrap();
        std::fs::write(sysctl, "0").unwrap();
        let net = Net::open().await.unwrap();
        let refused = net.withdraw(&facts("10.77.0.11", 24)).await.unwrap_err();
        assert!(refused.to_string().contains("10.77.0.100"), "{refused}");
        assert!(refused.help().unwrap().contains("promote_secondaries"));
        let here = net.addresses().await.unwrap();
        assert!(here.iter().any(|a| a.ip.to_string() == "10.77.0.100"));

        std::fs::write(sysctl, "1").unwrap();
        let withdrawn = net.withdraw(&facts("10.77.0.11", 24)).await.unwrap();
        let left = net.addresses().await.unwrap();
        assert!(
            left.iter()
                .any(|a| a.ip.to_string() == "10.77.0.100" && !a.secondary)
        );
        net.restore(&withdrawn).await.unwrap();
        let back = net.addresses().await.unwrap();
        assert!(back.iter().any(|a| a.ip.to_string() == "10.77.0.11"));
    });
}

#[test]
fn the_routes_of_an_interfaces_last_address_come_back() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, _) = links(&handle).await;
        add(&handle, eth0, "10.77.0.11", 24).await;
        let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .gateway([10, 77, 0, 1].into())
            .build();
        handle.route().add(route).execute().await.unwrap();
        let net = Net::open().await.unwrap();
        assert_eq!(
            net.default_sources().await.unwrap(),
            ["10.77.0.11".parse::<IpAddr>().unwrap()]
        );
        let before = routes(&handle).await;
        let withdrawn = net.withdraw(&facts("10.77.0.11", 24)).await.unwrap();
        assert!(net.default_sources().await.unwrap().is_empty());
        net.restore(&withdrawn).await.unwrap();
        assert_eq!(routes(&handle).await, before);
    });
}

/// Reads frames from an interface as they arrive there.
fn capture(ifindex: u32) -> OwnedFd {
    let every_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    // SAFETY: takes integers only; the descriptor is owned by nobody else.
    let fd = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(every_protocol),
        );
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: every field of the structure may be zero.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = every_protocol;
    address.sll_ifindex = i32::try_from(ifindex).unwrap();
    let limit = libc::timeval {
        tv_sec: 5,
        tv_usec: 0,
    };
    // SAFETY: both structures are complete and their sizes are passed along.
    unsafe {
        let size = u32::try_from(size_of_val(&address)).unwrap();
        assert_eq!(
            libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size),
            0
        );
        let size = u32::try_from(size_of_val(&limit)).unwrap();
        let set = libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const limit).cast(),
            size,
        );
        assert_eq!(set, 0);
    }
    fd
}

/// The next `count` frames that were sent by `mac` and are announcements.
fn announcements(fd: OwnedFd, ip: IpAddr, count: usize) -> Vec<Vec<u8>> {
    let mut file = File::from(fd);
    let mut found = Vec::new();
    while found.len() < count {
        let mut frame = vec![0; 2048];
        let length = file.read(&mut frame).expect("a frame in time");
        frame.truncate(length);
        let wanted = match ip {
            IpAddr::V4(ip) => frame[12..14] == [8, 6] && frame[28..32] == ip.octets(),
            IpAddr::V6(ip) => {
                frame[12..14] == [0x86, 0xdd]
                    && frame[20] == 58
                    && frame[54] == 136
                    && frame[62..78] == ip.octets()
            }
        };
        if wanted {
            found.push(frame);
        }
    }
    found
}

#[test]
fn announcements_arrive_at_the_other_end() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, peer0) = links(&handle).await;
        add(&handle, eth0, "10.77.0.12", 24).await;
        add(&handle, eth0, "fd00::12", 64).await;
        let net = Net::open().await.unwrap();
        for (ip, prefix_len) in [("10.77.0.100", 24), ("fd00::100", 64)] {
            let placement = net.place(&facts(ip, prefix_len)).await.unwrap();
            let staged = net.stage(&placement).await.unwrap();
            let wanted = announcement_frames(placement.ip, placement.mac.unwrap(), false);
            let socket = capture(peer0);
            net.announce(std::slice::from_ref(&placement))
                .await
                .unwrap();
            assert_eq!(announcements(socket, placement.ip, wanted.len()), wanted);

            let socket = capture(peer0);
            let twice = net.announce_again(vec![placement.clone()]);
            tokio::spawn(twice).await.unwrap().unwrap();
            let seen = announcements(socket, placement.ip, 2 * wanted.len());
            assert_eq!(seen, [wanted.clone(), wanted].concat());
            net.unstage(&staged).await.unwrap();
        }
        let gone = Placement {
            ip: "10.77.0.100".parse().unwrap(),
            prefix_len: 24,
            ifindex: 4711,
            interface: "eth7".to_owned(),
            mac: Some([2; 6]),
        };
        let failed = net.announce(&[gone]).await.unwrap_err();
        assert!(failed.to_string().contains("eth7"), "{failed}");
    });
}

/// A second host at the end of `peer0`, with 10.77.0.1 and fd00::1.
///
/// Its sockets are made by [`Peer::run`], on a thread of that namespace.
struct Peer {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Peer {
    async fn new(handle: &Handle, peer0: u32) -> Self {
        let (jobs, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (opened, namespace) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            opened
                .send(File::open("/proc/thread-self/ns/net").unwrap())
                .unwrap();
            for job in inbox {
                job();
            }
        });
        let namespace = namespace.recv_timeout(Duration::from_secs(5)).unwrap();
        let message = LinkUnspec::new_with_index(peer0)
            .setns_by_fd(namespace.as_raw_fd())
            .build();
        handle.link().set(message).execute().await.unwrap();
        let peer = Self { jobs };
        peer.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let handle = self::handle();
                up(&handle, "lo").await;
                let peer0 = up(&handle, "peer0").await;
                add(&handle, peer0, "10.77.0.1", 24).await;
                add(&handle, peer0, "fd00::1", 64).await;
            });
        });
        peer
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs
            .send(Box::new(move || done.send(job()).unwrap()))
            .unwrap();
        result.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    fn connect(&self, to: SocketAddr) -> TcpStream {
        self.run(move || TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap())
    }
}

/// The inode map of sockets that this process holds.
fn tree(sockets: &[&dyn AsRawFd]) -> BTreeMap<u64, Vec<(i32, i32)>> {
    let pid = i32::try_from(std::process::id()).unwrap();
    sockets
        .iter()
        .map(|socket| {
            let fd = socket.as_raw_fd();
            let link = std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap();
            (link.ino(), vec![(pid, fd)])
        })
        .collect()
}

#[test]
fn a_survey_of_real_sockets() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, peer0) = links(&handle).await;
        add(&handle, eth0, "10.77.0.11", 24).await;
        add(&handle, eth0, "10.77.0.100", 24).await;
        add(&handle, eth0, "fd00::11", 64).await;
        add(&handle, eth0, "fd00::100", 64).await;
        let peer = Peer::new(&handle, peer0).await;
        let net = Net::open().await.unwrap();

        let listener = TcpListener::bind("[::]:6379").unwrap();
        let _mapped_client = peer.connect("10.77.0.100:6379".parse().unwrap());
        let (mapped, _) = listener.accept().unwrap();
        let _v6_client = peer.connect("[fd00::100]:6379".parse().unwrap());
        let (v6, _) = listener.accept().unwrap();
        let specific = TcpListener::bind("10.77.0.100:7000").unwrap();
        let _v4_client = peer.connect("10.77.0.100:7000".parse().unwrap());
        let (v4, _) = specific.accept().unwrap();
        let loopback = TcpListener::bind("127.0.0.1:7001").unwrap();
        let inside = TcpStream::connect("127.0.0.1:7001").unwrap();
        let (inside2, _) = loopback.accept().unwrap();
        let udp = UdpSocket::bind("0.0.0.0:7002").unwrap();
        // SAFETY: takes integers only; the descriptor is owned by nobody else.
        let idle = unsafe {
            OwnedFd::from_raw_fd(libc::socket(
                libc::AF_INET,
                libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
                0,
            ))
        };
        let inodes = tree(&[
            &listener, &mapped, &v6, &specific, &v4, &loopback, &inside, &inside2, &udp, &idle,
        ]);
        let options = SurveyOptions::default();
        let found = survey(&net, &inodes, &options).await.unwrap();
        assert!(!refused(&found.findings), "{}", text(&found.findings));
        assert_eq!(found.flows.len(), 3, "{:?}", found.flows);
        assert!(found.flows.iter().all(|f| {
            ["10.77.0.1", "fd00::1"].contains(&f.remote.ip().to_string().as_str())
                && f.local.is_ipv4() == f.remote.is_ipv4()
        }));
        assert_eq!(found.listeners.len(), 3);
        let moving: Vec<String> = found.addresses.iter().map(|a| a.ip.to_string()).collect();
        assert_eq!(moving, ["10.77.0.100", "fd00::100"]);
        assert_eq!(found.interfaces, [eth0]);

        // Without its other end, the loopback pair leads out of the tree.
        let without = tree(&[&listener, &mapped, &v6, &specific, &v4, &loopback, &inside2]);
        let found = survey(&net, &without, &options).await.unwrap();
        assert!(refused(&found.findings), "{}", text(&found.findings));

        // A socket that another process shares the address with.
        let without = tree(&[&listener, &mapped, &v6]);
        let found = survey(&net, &without, &options).await.unwrap();
        let all = text(&found.findings);
        assert!(all.contains("10.77.0.100:7000 (listening)"), "{all}");

        // A socket of the other host is of another network namespace.
        let foreign = tree(&[&_v4_client]);
        let found = survey(&net, &foreign, &options).await.unwrap();
        let all = text(&found.findings);
        assert!(
            refused(&found.findings) && all.contains("another network namespace"),
            "{all}"
        );

        // Not accepted: the kernel's own until then.
        let _waiting = peer.connect("10.77.0.100:7000".parse().unwrap());
        // The peer knows that it is connected before this host does.
        loop {
            let found = survey(&net, &inodes, &options).await.unwrap();
            assert!(!refused(&found.findings), "{}", text(&found.findings));
            if text(&found.findings).contains("1 connection not accepted yet") {
                break;
            }
        }
    });
}

#[test]
fn listeners_show_how_they_listen() {
    in_netns(|| async {
        let handle = handle();
        up(&handle, "lo").await;
        let both = TcpListener::bind("[::]:7000").unwrap();
        // SAFETY: takes integers, and pointers to complete values with their sizes.
        let only = unsafe {
            let fd = OwnedFd::from_raw_fd(libc::socket(
                libc::AF_INET6,
                libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
                0,
            ));
            let on: i32 = 1;
            let set = libc::setsockopt(
                fd.as_raw_fd(),
                libc::IPPROTO_IPV6,
                libc::IPV6_V6ONLY,
                (&raw const on).cast(),
                4,
            );
            assert_eq!(set, 0);
            assert_eq!(libc::listen(fd.as_raw_fd(), 5), 0);
            fd
        };
        let sockets = tcp_sockets().unwrap();
        for (fd, v6only) in [(both.as_raw_fd(), false), (only.as_raw_fd(), true)] {
            let inode = std::fs::metadata(format!("/proc/self/fd/{fd}"))
                .unwrap()
                .ino();
            let socket = sockets.iter().find(|s| s.inode == inode).unwrap();
            assert_eq!(socket.state, TcpState::Listen);
            assert_eq!(socket.v6only, v6only);
        }
    });
}

#[test]
fn the_advertised_window_is_known() {
    in_netns(|| async {
        up(&handle(), "lo").await;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_far, _) = listener.accept().unwrap();
        // What the kernel tells the socket's own holder.
        // SAFETY: all zeros is a value of this plain C structure.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut bytes = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap();
        // SAFETY: the structure is ours and has the length given.
        let got = unsafe {
            libc::getsockopt(
                near.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut bytes,
            )
        };
        assert_eq!(got, 0);
        let inode = std::fs::metadata(format!("/proc/self/fd/{}", near.as_raw_fd()))
            .unwrap()
            .ino();
        let sockets = tcp_sockets().unwrap();
        let socket = sockets.iter().find(|s| s.inode == inode).unwrap();
        assert!(socket.window > 1000, "{socket:?}");
        assert_eq!(socket.window, info.tcpi_rcv_ssthresh);
    });
}

#[test]
fn multipath_tcp_is_recognised() {
    in_netns(|| async {
        let handle = handle();
        up(&handle, "lo").await;
        // SAFETY: takes integers only.
        let fd =
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 262) };
        if fd < 0 {
            println!("SKIP mptcp: {}", std::io::Error::last_os_error());
            assert!(mptcp_inodes().unwrap().is_empty());
            return;
        }
        // SAFETY: the descriptor was just made and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let net = Net::open().await.unwrap();
        let options = SurveyOptions::default();
        let found = survey(&net, &tree(&[&fd]), &options).await.unwrap();
        assert!(refused(&found.findings), "idle: {}", text(&found.findings));
        // SAFETY: takes integers only.
        assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 5) }, 0);
        let found = survey(&net, &tree(&[&fd]), &options).await.unwrap();
        assert!(
            refused(&found.findings),
            "listening: {}",
            text(&found.findings)
        );
        assert!(text(&found.findings).contains("multipathtcp=0"));
        assert!(found.listeners.is_empty());
    });
}

#[test]
fn unix_and_other_sockets() {
    in_netns(|| async {
        let handle = handle();
        up(&handle, "lo").await;
        let net = Net::open().await.unwrap();
        let options = SurveyOptions::default();
        let (a, b) = UnixStream::pair().unwrap();
        let found = survey(&net, &tree(&[&a, &b]), &options).await.unwrap();
        assert!(found.findings.is_empty(), "{}", text(&found.findings));

        let outside = tree(&[&a]);
        let inode = *outside.keys().next().unwrap();
        let found = survey(&net, &outside, &options).await.unwrap();
        assert!(refused(&found.findings));
        assert_eq!(found.external_unix, [inode]);
        let stdio = BTreeMap::from([(inode, vec![(1, 1)])]);
        let found = survey(&net, &stdio, &options).await.unwrap();
        assert!(!refused(&found.findings), "{}", text(&found.findings));
        assert_eq!(found.external_unix, [inode]);

        let packet = capture(1);
        let found = survey(&net, &tree(&[&packet]), &options).await.unwrap();
        assert!(
            text(&found.findings).contains("packet socket"),
            "{}",
            text(&found.findings)
        );
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        // SAFETY: takes integers only; the descriptor is owned by nobody else.
        let ping = unsafe {
            let fd = libc::socket(
                libc::AF_INET,
                libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
                libc::IPPROTO_ICMP,
            );
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd)
        };
        let found = survey(&net, &tree(&[&ping]), &options).await.unwrap();
        let all = text(&found.findings);
        assert!(
            refused(&found.findings) && all.contains("a ping socket"),
            "{all}"
        );
    });
}

#[test]
fn the_destination_compares() {
    in_netns(|| async {
        let handle = handle();
        let (eth0, _) = links(&handle).await;
        add(&handle, eth0, "10.77.0.12", 24).await;
        let net = Net::open().await.unwrap();
        let mut tree = TreeFacts {
            root_pid: 1,
            listeners: vec![migrate_core::Listener {
                local: "0.0.0.0:6379".parse().unwrap(),
                v6only: false,
            }],
            addresses: vec![facts("10.77.0.100", 24)],
            ..TreeFacts::default()
        };
        let (findings, placements) = compare(&net, &tree).await.unwrap();
        assert!(!refused(&findings), "{}", text(&findings));
        assert_eq!(placements.len(), 1);
        assert_eq!(placements[0].ifindex, eth0);

        let _busy = TcpListener::bind("[::]:6379").unwrap();
        tree.addresses.push(facts("192.168.9.9", 24));
        tree.addresses.push(facts("10.77.0.12", 24));
        let (findings, placements) = compare(&net, &tree).await.unwrap();
        let all = text(&findings);
        assert_eq!(placements.len(), 1);
        assert!(
            all.contains("no interface of this host takes 192.168.9.9/24"),
            "{all}"
        );
        assert!(all.contains("10.77.0.12 is already on eth0"), "{all}");
        assert!(all.contains("listens on [::]:6379"), "{all}");
    });
}

//! A real gate on a veth pair between two network namespaces: `server` stands
//! for the gated host, `client` for a peer. The server's namespaces have their
//! own mounts, so nothing stays behind even when a test fails.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use migrate_core::{Flow, Listener};
use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};

use super::packets::{Packet, SYN};
use crate::{
    Gate, GateError, GateOptions, HoldOptions, LeftoverMode, Role, adopt, extend, leftovers, unlock,
};

const SERVER_V4: &str = "10.9.0.1";
const STAGED_V4: &str = "10.9.0.50";
const SERVER_V6: &str = "fd00:9::1";
/// Long enough for what must arrive, short enough to wait for what must not.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
pub(super) const SILENCE: Duration = Duration::from_millis(250);

/// Of a gate whose owner is killed: what is looked at before it has run out
/// may take that long on a busy machine.
const LEASE: Duration = Duration::from_secs(5);

/// Names a directory to the process that plays the dying owner.
const OWNER_DIRECTORY: &str = "MIGRATE_GATE_TEST_DIRECTORY";
/// Has that process ask for holding.
const OWNER_HOLDS: &str = "MIGRATE_GATE_TEST_HOLD";

/// A network namespace with its own mounts.
pub(super) struct Host {
    pub(super) net: File,
    mnt: File,
}

impl Host {
    pub(super) fn new() -> Self {
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .unwrap();
            Self {
                net: File::open("/proc/thread-self/ns/net").unwrap(),
                mnt: File::open("/proc/thread-self/ns/mnt").unwrap(),
            }
        })
        .join()
        .unwrap()
    }

    /// Runs a closure, and what it spawns, inside.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // A thread can change its mounts only if it shares no
                    // working directory with others.
                    unshare(CloneFlags::CLONE_FS).unwrap();
                    setns(&self.mnt, CloneFlags::CLONE_NEWNS).unwrap();
                    setns(&self.net, CloneFlags::CLONE_NEWNET).unwrap();
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Both ends, and a directory for the pins.
pub(super) struct Pair {
    pub(super) server: Host,
    pub(super) client: Host,
    _scratch: tempfile::TempDir,
    pub(super) directory: PathBuf,
}

impl Pair {
    pub(super) fn new() -> Self {
        let (server, client) = (Host::new(), Host::new());
        let client_net = format!("/proc/{}/fd/{}", std::process::id(), client.net.as_raw_fd());
        server.run(|| {
            ip("link add gate0 type veth peer name gate1");
            ip(&format!("link set gate1 netns {client_net}"));
            ip(&format!("addr add {SERVER_V4}/24 dev gate0"));
            ip(&format!("addr add {SERVER_V6}/64 dev gate0 nodad"));
            ip("link set gate0 up");
            ip("link set lo up");
        });
        client.run(|| {
            ip("addr add 10.9.0.2/24 dev gate1");
            ip("addr add fd00:9::2/64 dev gate1 nodad");
            ip("link set gate1 up");
        });
        // Both ends are up now, and take packets a moment later.
        for (host, device) in [(&server, "gate0"), (&client, "gate1")] {
            host.run(|| await_carrier(device));
        }
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("bpf");
        Self {
            server,
            client,
            _scratch: scratch,
            directory,
        }
    }

    fn attach(&self) -> Gate {
        self.server.run(|| attach_here(&self.directory))
    }

    pub(super) fn listen(&self, address: &str) -> TcpListener {
        self.server.run(|| TcpListener::bind(address).unwrap())
    }

    pub(super) fn connect(&self, address: SocketAddr, within: Duration) -> io::Result<TcpStream> {
        self.client
            .run(|| TcpStream::connect_timeout(&address, within))
    }

    /// How many programs sit on the server's device, both directions.
    pub(super) fn programs(&self) -> usize {
        self.server.run(|| {
            if !crate::has_tcx() {
                return ["ingress", "egress"]
                    .map(|hook| {
                        let mut tc = Command::new("tc");
                        let output = tc.args(["filter", "show", "dev", "gate0", hook]).output();
                        let text = String::from_utf8(output.unwrap().stdout).unwrap();
                        text.matches("direct-action").count()
                    })
                    .iter()
                    .sum();
            }
            [TcAttachType::Ingress, TcAttachType::Egress]
                .map(|hook| SchedClassifier::query_tcx("gate0", hook).unwrap().1.len())
                .iter()
                .sum()
        })
    }

    /// The names of the devices that hold packets.
    pub(super) fn taps(&self) -> Vec<String> {
        self.server.run(|| {
            let devices = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            devices
                .lines()
                .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
                .filter(|name| name.starts_with("mg"))
                .collect()
        })
    }

    pub(super) fn assert_nothing_left(&self) {
        assert_eq!(self.programs(), 0);
        self.assert_only_others_left();
    }

    /// Nothing of the gate's own is left.
    pub(super) fn assert_only_others_left(&self) {
        assert_eq!(self.taps(), [""; 0]);
        self.server.run(|| {
            assert_eq!(leftovers(&self.directory).unwrap(), []);
            assert!(!self.directory.exists(), "the mount point stays behind");
        });
    }
}

fn attach_here(directory: &Path) -> Gate {
    let interfaces = ["lo", "gate0"].map(|name| if_nametoindex(name).unwrap());
    Gate::attach(&interfaces, &options(directory)).unwrap()
}

pub(super) fn options(directory: &Path) -> GateOptions {
    GateOptions {
        id: "test-1".to_owned(),
        role: Role::Source,
        flow_capacity: 64,
        directory: directory.to_owned(),
        hold: None,
        is_extensible: false,
    }
}

/// Held while a process is started or a gate is removed: a new process has all
/// open files of this one for a moment, the gates of other tests included, and
/// they stay for as long.
pub(super) fn starting() -> MutexGuard<'static, ()> {
    static STARTING: Mutex<()> = Mutex::new(());
    STARTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a gate, in the calling thread's namespaces.
pub(super) fn detach(gate: Gate) {
    let _starting = starting();
    gate.detach().unwrap();
}

/// Runs iproute2, which a test may use although the product does not.
pub(super) fn ip(arguments: &str) {
    let _starting = starting();
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// Waits until the kernel has noticed that a device's other end is up: before
/// that it drops what is sent.
fn await_carrier(device: &str) {
    let end = Instant::now() + PATIENCE;
    while !shown(device).contains("state UP") {
        assert!(Instant::now() < end, "{}", shown(device));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What iproute2 says of a device.
fn shown(device: &str) -> String {
    let _starting = starting();
    let mut ip = Command::new("ip");
    let output = ip.args(["link", "show", "dev", device]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The result of reading one byte within a while.
pub(super) fn read_one(mut stream: &TcpStream, within: Duration) -> Result<u8, io::ErrorKind> {
    stream.set_read_timeout(Some(within)).unwrap();
    let mut byte = [0];
    match stream.read_exact(&mut byte) {
        Ok(()) => Ok(byte[0]),
        Err(error) => Err(error.kind()),
    }
}

fn talk(mut from: &TcpStream, to: &TcpStream, byte: u8) {
    from.write_all(&[byte]).unwrap();
    assert_eq!(read_one(to, PATIENCE), Ok(byte));
}

/// One connection through an open, closed, half open and open gate, and its
/// abrupt end behind a closed one.
fn through_all_states(listen: &str, connect: &str) {
    let pair = Pair::new();
    let listening = pair.listen(listen);
    let gate = pair.attach();
    assert_eq!(pair.programs(), 2, "loopback is left out");
    let connect: SocketAddr = connect.parse().unwrap();
    let client = pair.connect(connect, PATIENCE).unwrap();
    let (server, remote) = listening.accept().unwrap();
    talk(&client, &server, 1);
    talk(&server, &client, 2);

    gate.add_flows(&[Flow::new(server.local_addr().unwrap(), remote)])
        .unwrap();
    gate.add_listeners(&[Listener {
        local: listening.local_addr().unwrap(),
        v6only: false,
    }])
    .unwrap();
    talk(&client, &server, 3);
    gate.lease(Some(Duration::from_secs(60))).unwrap();
    gate.close().unwrap();
    (&client).write_all(&[4]).unwrap();
    assert_eq!(read_one(&server, SILENCE), Err(io::ErrorKind::WouldBlock));
    (&server).write_all(&[5]).unwrap();
    assert_eq!(read_one(&client, SILENCE), Err(io::ErrorKind::WouldBlock));
    assert_eq!(
        pair.connect(connect, SILENCE).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    let counters = gate.counters().unwrap();
    assert!(counters.ingress_dropped_packets >= 2, "{counters:?}");
    assert!(counters.egress_dropped_packets >= 1, "{counters:?}");

    gate.open_egress().unwrap();
    assert_eq!(read_one(&client, PATIENCE), Ok(5));
    assert_eq!(read_one(&server, SILENCE), Err(io::ErrorKind::WouldBlock));
    gate.open().unwrap();
    assert_eq!(read_one(&server, PATIENCE), Ok(4));
    talk(&client, &server, 6);

    gate.close().unwrap();
    reset(server);
    assert_eq!(read_one(&client, SILENCE), Err(io::ErrorKind::WouldBlock));
    // Nobody listens any more, and the peer does not learn it.
    drop(listening);
    assert_eq!(
        pair.connect(connect, SILENCE).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    let counters = gate.counters().unwrap();
    assert_eq!((counters.rst_dropped, counters.rst_sent), (1, 0));

    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
    // What the gate has kept from happening.
    assert_eq!(
        pair.connect(connect, PATIENCE).unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
}

/// Closes with an RST.
fn reset(stream: TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: a live socket, and a structure of the size given.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            u32::try_from(size_of_val(&linger)).unwrap(),
        )
    };
    assert_eq!(result, 0);
    drop(stream);
}

#[test]
fn an_ipv4_connection_meets_every_state() {
    needs_root!("an_ipv4_connection_meets_every_state");
    through_all_states("10.9.0.1:7000", "10.9.0.1:7000");
}

#[test]
fn an_ipv6_connection_meets_every_state() {
    needs_root!("an_ipv6_connection_meets_every_state");
    through_all_states("[fd00:9::1]:7000", "[fd00:9::1]:7000");
}

#[test]
fn a_mapped_connection_meets_every_state() {
    needs_root!("a_mapped_connection_meets_every_state");
    through_all_states("[::]:7000", "10.9.0.1:7000");
}

#[test]
fn a_gate_whose_owner_is_killed_opens_by_its_lease() {
    needs_root!("a_gate_whose_owner_is_killed_opens_by_its_lease");
    killed_owner(false);
}

#[test]
fn a_holding_gate_whose_owner_is_killed_drops_then_opens() {
    needs_root!("a_holding_gate_whose_owner_is_killed_drops_then_opens");
    needs_tun!("a_holding_gate_whose_owner_is_killed_drops_then_opens");
    killed_owner(true);
}

fn killed_owner(holds: bool) {
    let pair = Pair::new();
    let listening = pair.listen("10.9.0.1:7000");
    let address = listening.local_addr().unwrap();
    let mut owner = pair.server.run(|| {
        let _starting = starting();
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "tests::network::an_owner_to_be_killed",
                "--nocapture",
            ])
            .env(OWNER_DIRECTORY, &pair.directory)
            .env(OWNER_HOLDS, if holds { "1" } else { "" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("closed")));
    let found = pair.server.run(|| leftovers(&pair.directory).unwrap());
    let [gate] = found.as_slice() else {
        panic!("one gate: {found:?}")
    };
    assert_eq!((gate.id.as_str(), gate.role), ("test-1", Role::Source));
    assert_eq!((gate.owner_pid, gate.owner_alive), (owner.id(), true));
    assert_eq!((gate.mode, gate.flows), (LeftoverMode::Closed, 1));
    let gate0 = pair.server.run(|| if_nametoindex("gate0").unwrap());
    assert_eq!(gate.interfaces, [gate0]);
    assert_eq!(pair.taps().len(), if holds { 2 } else { 0 });
    let refused = pair
        .server
        .run(|| adopt(&pair.directory, "test-1", Role::Source).unwrap_err());
    assert!(matches!(refused, GateError::Owned { .. }), "{refused}");

    owner.kill().unwrap();
    owner.wait().unwrap();
    let killed = Instant::now();
    let found = pair.server.run(|| leftovers(&pair.directory).unwrap());
    assert!(!found[0].owner_alive);
    assert_eq!(found[0].mode, LeftoverMode::Closed, "killing opens nothing");
    assert_eq!(pair.taps(), [""; 0], "the devices go with their owner");
    let left = found[0].deadline_in.unwrap();
    // The SYN is sent again after 1 s, 2 s, 4 s.
    drop(pair.connect(address, LEASE + PATIENCE).unwrap());
    assert!(killed.elapsed() >= left.saturating_sub(Duration::from_millis(20)));
    let found = pair.server.run(|| leftovers(&pair.directory).unwrap());
    assert_eq!(found[0].mode, LeftoverMode::Open);
    assert_eq!(found[0].deadline_in, Some(Duration::ZERO));
    assert_eq!(pair.programs(), 2);

    pair.server.run(|| {
        let _starting = starting();
        unlock(&pair.directory, "test-1", Role::Source).unwrap();
    });
    pair.assert_nothing_left();
}

/// Not a test of its own: the process that the test above starts and kills.
#[test]
fn an_owner_to_be_killed() {
    let Some(directory) = std::env::var_os(OWNER_DIRECTORY) else {
        return;
    };
    let directory = Path::new(&directory);
    let holds = std::env::var(OWNER_HOLDS).is_ok_and(|value| !value.is_empty());
    let options = GateOptions {
        hold: holds.then(HoldOptions::default),
        ..options(directory)
    };
    let gate = Gate::attach(&[if_nametoindex("gate0").unwrap()], &options).unwrap();
    assert_eq!(gate.holds(), holds, "{:?}", gate.drop_reason());
    gate.add_flows(&[Flow::new(
        "10.9.0.1:1".parse().unwrap(),
        "10.9.0.2:2".parse().unwrap(),
    )])
    .unwrap();
    gate.add_listeners(&[Listener {
        local: "10.9.0.1:7000".parse().unwrap(),
        v6only: false,
    }])
    .unwrap();
    gate.lease(Some(LEASE)).unwrap();
    gate.close().unwrap();
    println!("closed");
    // Ends with the killing, or with the parent.
    let _ = io::stdin().read(&mut [0]);
}

#[test]
fn a_dropped_gate_is_adopted_and_detached() {
    needs_root!("a_dropped_gate_is_adopted_and_detached");
    let pair = Pair::new();
    let listening = pair.listen("10.9.0.1:7000");
    let address = listening.local_addr().unwrap();
    let gate = pair.attach();
    gate.add_listeners(&[Listener {
        local: address,
        v6only: false,
    }])
    .unwrap();
    gate.close().unwrap();
    drop(gate);
    assert_eq!(
        pair.connect(address, SILENCE).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    pair.server.run(|| {
        let directory = &pair.directory;
        let again = Gate::attach(&[if_nametoindex("gate0").unwrap()], &options(directory));
        assert!(matches!(again, Err(GateError::AlreadyAttached { .. })));
        let other = unlock(directory, "test-1", Role::Destination).unwrap_err();
        assert!(matches!(other, GateError::NotFound { .. }), "{other}");
        let gate = adopt(directory, "test-1", Role::Source).unwrap();
        assert!(gate.counters().unwrap().ingress_dropped_packets > 0);
        gate.open().unwrap();
        detach(gate);
    });
    drop(pair.connect(address, PATIENCE).unwrap());
    pair.assert_nothing_left();
}

#[test]
fn a_gate_is_put_on_a_device_that_comes_later() {
    needs_root!("a_gate_is_put_on_a_device_that_comes_later");
    let pair = Pair::new();
    let listening = pair.listen("10.9.0.1:7000");
    let address = listening.local_addr().unwrap();
    pair.server.run(|| {
        let directory = &pair.directory;
        let gate0 = if_nametoindex("gate0").unwrap();
        let lo = if_nametoindex("lo").unwrap();
        let extend = |interface| extend(directory, "test-1", Role::Source, interface);
        assert!(matches!(extend(gate0), Err(GateError::NotFound { .. })));
        {
            let _starting = starting();
            let gate = Gate::attach(&[gate0], &options(directory)).unwrap();
            assert!(!leftovers(directory).unwrap()[0].is_extensible);
            assert!(matches!(extend(lo), Ok(false)));
            gate.detach().unwrap();
        }
        let options = GateOptions {
            is_extensible: true,
            ..options(directory)
        };
        let gate = Gate::attach(&[], &options).unwrap();
        gate.add_listeners(&[Listener {
            local: address,
            v6only: false,
        }])
        .unwrap();
        gate.close().unwrap();
        gate.leave().unwrap();
    });
    drop(pair.connect(address, PATIENCE).unwrap());
    pair.server.run(|| {
        let directory = &pair.directory;
        let found = &leftovers(directory).unwrap()[0];
        assert!(found.is_extensible && found.interfaces.is_empty());
        let gate0 = if_nametoindex("gate0").unwrap();
        // Of many that are told of it at once one puts it there.
        let told = std::thread::scope(|scope| {
            let extend = || {
                pair.server
                    .run(|| extend(directory, "test-1", Role::Source, gate0).unwrap())
            };
            let told: Vec<_> = (0..4).map(|_| scope.spawn(extend)).collect();
            told.into_iter()
                .map(|told| told.join().unwrap())
                .collect::<Vec<_>>()
        });
        assert_eq!(told.iter().filter(|is_new| **is_new).count(), 1, "{told:?}");
        assert_eq!(leftovers(directory).unwrap()[0].interfaces, [gate0]);
        assert!(matches!(
            extend(directory, "test-1", Role::Source, 9999),
            Err(GateError::Interface { index: 9999, .. })
        ));
    });
    assert_eq!(pair.programs(), 2);
    assert_eq!(
        pair.connect(address, SILENCE).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    pair.server.run(|| {
        let _starting = starting();
        unlock(&pair.directory, "test-1", Role::Source).unwrap();
    });
    drop(pair.connect(address, PATIENCE).unwrap());
    pair.assert_nothing_left();
}

#[test]
fn two_gates_share_a_device_and_a_directory() {
    needs_root!("two_gates_share_a_device_and_a_directory");
    let pair = Pair::new();
    let first = pair.attach();
    let second = pair.server.run(|| {
        let mut options = options(&pair.directory);
        options.id = "test-2".to_owned();
        options.role = Role::Destination;
        Gate::attach(&[if_nametoindex("gate0").unwrap()], &options).unwrap()
    });
    assert_eq!(pair.programs(), 4);
    pair.server.run(|| {
        detach(first);
        let found = leftovers(&pair.directory).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].mode, LeftoverMode::Open);
        detach(second);
    });
    pair.assert_nothing_left();
}

#[test]
fn a_staged_address_is_not_found_until_it_is_unstaged() {
    needs_root!("a_staged_address_is_not_found_until_it_is_unstaged");
    let pair = Pair::new();
    let staged: IpAddr = STAGED_V4.parse().unwrap();
    let gate = pair.attach();
    gate.stage_addresses(&[staged]).unwrap();
    pair.server
        .run(|| ip(&format!("addr add {STAGED_V4}/32 dev gate0")));
    let listening = pair.listen("10.9.0.50:7000");
    let address = listening.local_addr().unwrap();
    assert_eq!(
        pair.connect(address, SILENCE).unwrap_err().kind(),
        io::ErrorKind::TimedOut
    );
    assert!(gate.counters().unwrap().staged_dropped_packets > 0);
    gate.unstage_addresses(&[staged]).unwrap();
    drop(pair.connect(address, PATIENCE).unwrap());
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn a_device_without_ethernet_header_is_gated() {
    needs_root!("a_device_without_ethernet_header_is_gated");
    needs_tun!("a_device_without_ethernet_header_is_gated");
    let pair = Pair::new();
    pair.server.run(|| {
        let mut tun = tun("gate2");
        ip("link set gate2 up");
        let gate = Gate::attach(
            &[if_nametoindex("gate2").unwrap()],
            &options(&pair.directory),
        )
        .unwrap();
        gate.add_listeners(&[Listener {
            local: "10.9.1.1:7000".parse().unwrap(),
            v6only: false,
        }])
        .unwrap();
        gate.close().unwrap();
        for port in [7000, 7001] {
            let to = format!("10.9.1.1:{port}");
            let frame = Packet::tcp("10.9.1.2:5000", &to, SYN).bytes();
            tun.write_all(&frame[14..]).unwrap();
        }
        assert_eq!(gate.counters().unwrap().ingress_dropped_packets, 1);
        detach(gate);
    });
    pair.assert_nothing_left();
}

/// A TUN device, which goes with its file.
pub(super) fn tun(name: &str) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: all zeros is a value of this plain C structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap();
    // SAFETY: a live descriptor and a valid request with a terminated name.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
    assert_eq!(result, 0);
    file
}

#[test]
fn what_cannot_be_attached_is_refused_and_leaves_nothing() {
    needs_root!("what_cannot_be_attached_is_refused_and_leaves_nothing");
    let pair = Pair::new();
    pair.server.run(|| {
        let good = options(&pair.directory);
        let gate0 = if_nametoindex("gate0").unwrap();
        let lo = if_nametoindex("lo").unwrap();
        let refused = |interfaces: &[u32], options: &GateOptions| {
            Gate::attach(interfaces, options).unwrap_err()
        };
        assert!(matches!(refused(&[], &good), GateError::NoInterface));
        assert!(matches!(refused(&[lo], &good), GateError::NoInterface));
        assert!(matches!(
            refused(&[gate0, 9999], &good),
            GateError::Interface { index: 9999, .. }
        ));
        for id in ["", "../x", "A", &"a".repeat(65)] {
            let bad = GateOptions {
                id: id.to_owned(),
                ..good.clone()
            };
            assert!(matches!(refused(&[gate0], &bad), GateError::BadId { .. }));
        }
        let too_many = GateOptions {
            flow_capacity: u32::MAX,
            ..good
        };
        assert!(matches!(refused(&[gate0], &too_many), GateError::Load(_)));
    });
    pair.assert_nothing_left();
}

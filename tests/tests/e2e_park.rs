//! Trees parked, a boot played, and resumed: their peers stay connected. And
//! everything that must be refused on the way.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpStream;
use std::path::PathBuf;

use migrate_test_hosts::{Host, HostName, INTERFACE, WORKLOAD_V4};
use migrate_tests::client::{StrictClient, program};
use migrate_tests::hosts::{
    ResetCapture, TcpCounts, eventually, listens, process_name, reset_connections, runs,
};
use migrate_tests::migration::serves_old_connections;
use migrate_tests::parking::{
    DIR, PATIENT, WITHIN, another_machine, clean_client, comes_up, edit, goes_down, held,
    make_directory, run, succeeds, with,
};
use migrate_tests::refusals::{
    Ended, INTERRUPTED, REFUSED, ROLLED_BACK, Running, Scene, guards, runner, scoped, shell,
};
use migrate_tests::require;
use migrate_tests::tunnel::{self, End};
use migrate_tests::workload::{Kind, Workload};
use nix::sys::signal::{Signal, kill};

#[track_caller]
fn parks(host: &Host, pids: &[i32], more: &[&str]) -> Ended {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let mut arguments = vec!["park", "--dir", DIR];
    arguments.extend(pids.iter().map(String::as_str));
    arguments.extend(more);
    let ended = succeeds(host, &arguments);
    for pid in pids {
        let pid = pid.parse().unwrap();
        assert!(eventually(WITHIN, || !runs(host, pid)), "{pid} is parked");
    }
    ended
}

#[test]
fn two_trees_come_back_after_a_boot() {
    require!("two_trees_come_back_after_a_boot": root, tcx, criu, migrate, redis, memcached, tcpdump);
    let lab = scoped("park-two");
    let host = lab.host(HostName::Host1);
    let resets = reset_connections(&lab.host(HostName::Client)).unwrap();
    let redis = Workload::start(Kind::Redis, &lab).unwrap();
    let memcached = Workload::start(Kind::Memcached, &lab).unwrap();
    let keys = ["--keys", "20000", "--populate", "--verify"];
    let mut clients = [
        redis.client(&lab, 5, &[&keys[..], &PATIENT].concat()),
        memcached.client(&lab, 5, &PATIENT),
    ]
    .map(Result::unwrap);
    clients.iter_mut().for_each(serves_old_connections);
    let capture = ResetCapture::start(&lab.host(HostName::Client)).unwrap();
    make_directory(&host);

    let names = ["--name", "cache", "--name", "sessions"];
    let parked = parks(&host, &[redis.pid, memcached.pid], &names);
    assert!(parked.stdout.contains("5 peers"), "{parked:#?}");
    assert!(parked.stdout.contains("924 s"), "{parked:#?}");
    // A stranger's look does not open the gate.
    let unlock = run(&host, &["unlock"]);
    unlock.expect(REFUSED, &["waits with a parked tree"]);
    // Nor does a guard that finds a way to the host that the trees have never used.
    shell(&host, "ip link add spare type veth peer name other");
    let early = succeeds(&host, &["guard-boot", "--dir", DIR]).stdout;
    assert_eq!(early.matches("as before").count(), 2, "{early}");

    goes_down(&host);
    let guarded = succeeds(&host, &["guard-boot", "--dir", DIR]);
    assert!(
        guarded
            .stdout
            .contains("cache: nothing answers for 5 connections")
    );
    assert!(
        guarded
            .stdout
            .contains("sessions: nothing answers for 5 connections")
    );
    let again = succeeds(&host, &["guard-boot", "--dir", DIR]);
    assert!(again.stdout.contains("as before"), "{again:#?}");
    comes_up(&host);
    // Peers ask again and hear nothing, in particular no reset.
    let sent_again = || {
        TcpCounts::of(&lab.host(HostName::Client))
            .unwrap()
            .retransmitted
    };
    let before = sent_again();
    assert!(eventually(WITHIN, || sent_again() > before + 3));

    let list = succeeds(&host, &["resume", "--list", "--dir", DIR]);
    assert_eq!(list.stdout.matches("; waits").count(), 2, "{list:#?}");
    let resumed = succeeds(&host, &["resume", "--dir", DIR]);
    assert_eq!(
        resumed.stdout.matches("runs again").count(),
        2,
        "{resumed:#?}"
    );
    clients.iter_mut().for_each(serves_old_connections);
    for pid in [redis.pid, memcached.pid] {
        assert!(runs(&host, pid));
    }
    let list = succeeds(&host, &["resume", "--list", "--dir", DIR]);
    assert_eq!(list.stdout.matches("; was resumed").count(), 2, "{list:#?}");
    assert!(!host.path(DIR).join("cache/images").exists());
    migrate_tests::migration::no_gate_left(&host);
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
    for client in clients {
        clean_client(&lab, client, resets);
    }
    // And once more, into the same sets.
    parks(&host, &[redis.pid, memcached.pid], &names);
    succeeds(&host, &["resume", "--dir", DIR]);
    assert!(runs(&host, redis.pid) && runs(&host, memcached.pid));
}

#[test]
fn without_the_guard_a_booted_kernel_resets() {
    require!("without_the_guard_a_booted_kernel_resets": root, tcx, criu, migrate);
    let lab = scoped("park-unguarded");
    let host = lab.host(HostName::Host1);
    let resets = reset_connections(&lab.host(HostName::Client)).unwrap();
    let echo = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = echo.client(&lab, 3, &[]).unwrap();
    serves_old_connections(&mut client);
    make_directory(&host);
    parks(&host, &[echo.pid], &[]);
    goes_down(&host);
    comes_up(&host);
    let reset = || reset_connections(&lab.host(HostName::Client)).unwrap() > resets;
    assert!(eventually(WITHIN, reset));
}

/// Nobody knows the connections of a set that is torn: none is reset, and the host is reached.
#[test]
fn a_torn_set_silences_resets_and_nothing_else() {
    require!("a_torn_set_silences_resets_and_nothing_else": root, tcx, criu, migrate, tcpdump);
    let lab = scoped("park-torn");
    let host = lab.host(HostName::Host1);
    let peer = lab.host(HostName::Client);
    let resets = reset_connections(&peer).unwrap();
    let echo = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = echo.client(&lab, 3, &PATIENT).unwrap();
    serves_old_connections(&mut client);
    let capture = ResetCapture::start(&peer).unwrap();
    make_directory(&host);
    parks(&host, &[echo.pid], &["--name", "echo"]);
    goes_down(&host);
    let guard = ["guard-boot", "--dir", DIR];
    let manifest = host.path(DIR).join("echo/manifest.json");
    with(
        &manifest,
        |content| content.truncate(content.len() / 2),
        || {
            // Without an interface nothing can be done: the network has to stay down.
            let alone = host.exec(["unshare", "--net", "migrate"].iter().chain(&guard));
            let alone = alone.unwrap();
            let said = String::from_utf8_lossy(&alone.stderr);
            assert!(said.contains("the network must not come up"), "{said}");
            assert!(!matches!(alone.status.code(), Some(0 | REFUSED)), "{said}");
            // Unless whoever sees one come tells of it.
            let script = format!(
                "migrate guard-boot --interface lo || exit 9; \
                 migrate guard-boot --interfaces-follow --dir {DIR}; [ $? = {REFUSED} ] || exit 10; \
                 migrate status; ip link add card type veth peer name far; \
                 migrate guard-boot --interface card || exit 11; migrate status; \
                 migrate guard-boot --interface /sys/class/net/none && exit 12; true"
            );
            let follows = host
                .exec(["unshare", "--net", "sh", "-c", &script])
                .unwrap();
            let said = String::from_utf8_lossy(&follows.stdout);
            assert!(follows.status.success(), "{follows:?}");
            for words in [
                ": closed on 0 interfaces",
                "card: 1 gate there, too",
                ": closed on card",
            ] {
                assert!(said.contains(words), "{words}: {follows:?}");
            }
            let said = String::from_utf8_lossy(&follows.stderr);
            assert!(said.contains("no interface /sys/class/net/none"), "{said}");

            for _ in 0..2 {
                let words = [
                    "only a part of one",
                    "sends no resets at all",
                    "migrate guard-boot",
                ];
                run(&host, &guard).expect(REFUSED, &words);
            }
            comes_up(&host);
            let status = succeeds(&host, &["status"]).stdout;
            assert!(status.contains("no reset leaves this host"), "{status}");
            let unlock = run(&host, &["unlock"]);
            unlock.expect(REFUSED, &["could not be read", "migrate guard-boot"]);
            // Peers ask again and hear nothing, and the host is there for whoever logs in.
            let sent_again = || TcpCounts::of(&peer).unwrap().retransmitted;
            let before = sent_again();
            assert!(eventually(WITHIN, || sent_again() > before + 3));
            let sshd = (host.ipv4(), 22);
            // What it says is read, for a close before that would be a reset.
            let greeted = peer.in_network(|| {
                let mut line = String::new();
                BufReader::new(TcpStream::connect(sshd)?).read_line(&mut line)?;
                Ok::<_, std::io::Error>(line)
            });
            let greeting = greeted.unwrap().unwrap();
            assert!(greeting.starts_with("SSH-"), "{greeting}");
        },
    );
    // With the manifest back its connections are known.
    let again = succeeds(&host, &guard);
    assert!(again.stdout.contains("sends resets again"), "{again:#?}");
    assert!(
        again.stdout.contains("nothing answers for 3 connections"),
        "{again:#?}"
    );
    succeeds(&host, &["resume", "--dir", DIR]);
    serves_old_connections(&mut client);
    migrate_tests::migration::no_gate_left(&host);
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
    clean_client(&lab, client, resets);
    // It speaks again: nobody is at this port.
    let closed = (host.ipv4(), 9);
    let refused = peer.in_network(|| TcpStream::connect(closed).map(drop));
    let refused = refused.unwrap().unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_tree_on_the_hosts_own_address_comes_back() {
    require!("a_tree_on_the_hosts_own_address_comes_back": root, tcx, criu, migrate);
    let lab = scoped("park-own");
    let host = lab.host(HostName::Host1);
    let resets = reset_connections(&lab.host(HostName::Client)).unwrap();
    let listen = format!("{}:7000", host.ipv4());
    let argv = [program("echo-server").display().to_string(), listen.clone()];
    let pid = host.spawn_detached(argv, "/dev/null").unwrap();
    assert!(eventually(WITHIN, || listens(&host, 7000)));
    let client = lab.host(HostName::Client);
    let arguments = ["echo", "--addr", &listen, "--connections", "4"];
    let arguments = arguments.iter().chain(&PATIENT);
    let mut client = StrictClient::start(&client, arguments).unwrap();
    serves_old_connections(&mut client);
    make_directory(&host);
    parks(&host, &[pid], &[]);
    // The host itself stays reachable meanwhile.
    let sshd = (host.ipv4(), 22);
    let connected = lab
        .host(HostName::Client)
        .in_network(|| TcpStream::connect(sshd).map(drop));
    connected.unwrap().unwrap();
    goes_down(&host);
    succeeds(&host, &["guard-boot", "--dir", DIR]);
    comes_up(&host);
    succeeds(&host, &["resume", "--dir", DIR]);
    serves_old_connections(&mut client);
    clean_client(&lab, client, resets);
}

/// The tunnel over TCP, its tun device, and connections through it to somebody behind the server:
/// they outlive a boot of the server's host, and a move to another host; the device has to be
/// there first.
#[test]
fn an_openvpn_tunnel_comes_back_after_a_boot() {
    require!("an_openvpn_tunnel_comes_back_after_a_boot": root, tcx, criu, migrate, openvpn);
    let lab = scoped("park-vpn");
    let [host, behind, peer] =
        [HostName::Host1, HostName::Host2, HostName::Client].map(|name| lab.host(name));
    let resets = reset_connections(&peer).unwrap();
    let keys = tempfile::tempdir().unwrap();
    tunnel::certify(keys.path()).unwrap();
    for (host, end) in [(&host, End::Server), (&peer, End::Client)] {
        for (from, to) in end.keys(keys.path()) {
            fs::copy(from, host.path(to)).unwrap();
        }
    }
    shell(&host, tunnel::DEVICE);
    shell(&host, &tunnel::router());
    shell(&behind, &tunnel::behind());
    let server = host.spawn_detached(tunnel::server(), "/dev/null").unwrap();
    assert!(eventually(WITHIN, || listens(&host, tunnel::PORT)));
    peer.spawn_detached(tunnel::client(), "/dev/null").unwrap();
    assert!(eventually(WITHIN, || {
        let up = peer.exec(["sh", "-c", tunnel::ROUTE]).unwrap();
        up.status.success()
    }));
    let listen = format!("{}:7000", tunnel::BEHIND);
    let echo = program("echo-server").display().to_string();
    behind
        .spawn_detached([echo, listen.clone()], "/dev/null")
        .unwrap();
    assert!(eventually(WITHIN, || listens(&behind, 7000)));
    let arguments = ["echo", "--addr", &listen, "--connections", "4"];
    let arguments = arguments.iter().chain(&PATIENT);
    let mut client = StrictClient::start(&peer, arguments).unwrap();
    serves_old_connections(&mut client);
    make_directory(&host);

    // Once with all that CRIU reads, once with what has changed.
    for engine in ["full", "auto"] {
        println!("== {engine}");
        parks(&host, &[server], &["--name", "vpn", "--engine", engine]);
        goes_down(&host);
        shell(&host, "ip link del tun0");
        succeeds(&host, &["guard-boot", "--dir", DIR]);
        comes_up(&host);
        shell(&host, &tunnel::router());
        let resume = ["resume", "--dir", DIR];
        let ended = run(&host, &resume);
        ended.expect(
            REFUSED,
            &[
                "tunnel device tun0",
                "is not there on this host",
                "ip tuntap add",
            ],
        );
        shell(&host, tunnel::DEVICE);
        // The device lets nobody else in while it is served, and the second CRIU
        // gets it all the same.
        let mut command = host.command("migrate");
        command.args(resume).env("MIGRATE_STOP_AT", "prepared");
        command.env("MIGRATE_LOG", "warn");
        let running = Running::start(command);
        let resuming = held(&host, "resume");
        kill_criu_of(resuming);
        kill(resuming, Signal::SIGCONT).unwrap();
        let ended = running.finish();
        assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
        assert!(ended.text().contains("CRIU is started anew"), "{ended:#?}");
        assert!(runs(&host, server));
        serves_old_connections(&mut client);
    }
    // Nor need it be parked: the other host has the device as well.
    let pid = server.to_string();
    let moves = ["--to", behind.name().as_str(), &pid];
    let refused = run(&host, &moves);
    refused.expect(
        REFUSED,
        &["tunnel device tun0", "is not there on the destination"],
    );
    shell(&behind, &format!("ip route del {}", tunnel::CLIENT));
    shell(&behind, tunnel::DEVICE);
    shell(&behind, "ip link set tun0 down");
    run(&host, &moves).expect(REFUSED, &["is down on", "ip link set tun0 up"]);
    shell(&behind, "ip link set tun0 up");
    succeeds(&host, &moves);
    assert!(runs(&behind, server));
    assert!(eventually(WITHIN, || !runs(&host, server)));
    serves_old_connections(&mut client);
    // One that would go with the program would not be there for it.
    let more = ["--proto", "tcp-server", "--log", "/dev/null"];
    let other = tunnel::openvpn(End::Server, "tun9", 1195, &more);
    let other = host.spawn_detached(other, "/dev/null").unwrap();
    assert!(eventually(WITHIN, || listens(&host, 1195)));
    let ended = run(&host, &["park", &other.to_string(), "--dir", DIR]);
    ended.expect(
        REFUSED,
        &["tun9", "goes with the program", "ip tuntap add dev tun9"],
    );
    // All of it was one session: nobody has connected or agreed on keys anew.
    let said = fs::read_to_string(peer.path(tunnel::CLIENT_LOG)).unwrap();
    assert_eq!(said.matches(tunnel::AGREED).count(), 1, "{said}");
    clean_client(&lab, client, resets);
}

#[test]
fn directories_that_nothing_can_be_parked_in() {
    require!("directories_that_nothing_can_be_parked_in": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-dirs", Kind::Echo, 3);
    let host = scene.source();
    let pid = scene.workload.pid.to_string();
    let park = |dir: &str| {
        let mut command = host.command("migrate");
        command.args(["park", &pid, "--name", "echo", "--dir", dir]);
        command
    };
    scene.fails(
        park("/srv/none"),
        REFUSED,
        &["/srv/none does not exist", "mkdir"],
    );
    shell(&host, "touch /srv/file");
    scene.fails(park("/srv/file"), REFUSED, &["/srv/file is no directory"]);
    shell(&host, "mkdir -m 777 /srv/open");
    scene.fails(
        park("/srv/open"),
        REFUSED,
        &["can be changed by others", "chmod 700"],
    );
    shell(
        &host,
        "mkdir -p -m 700 /srv/foreign/echo && touch /srv/foreign/echo/diary",
    );
    scene.fails(
        park("/srv/foreign"),
        REFUSED,
        &["something else than a parked tree: diary"],
    );
    assert!(host.path("/srv/foreign/echo/diary").exists());
    shell(
        &host,
        "mkdir /srv/small && mount -t tmpfs -o size=1m,mode=700 tmpfs /srv/small",
    );
    scene.fails(
        park("/srv/small"),
        REFUSED,
        &["space in /srv/small", "MiB are free"],
    );
    make_directory(&host);
    let mut command = host.command("migrate");
    command.args(["park", &pid, "--name", "../echo", "--dir", DIR]);
    scene.fails(command, 2, &["cannot name a parked tree"]);
    // All or none: a PID that nobody has, behind one that can be parked.
    let mut command = host.command("migrate");
    command.args(["park", &pid, "4194303", "--dir", DIR]);
    let ended = Running::start(command).finish();
    ended.expect(REFUSED, &["4194303", "runs again"]);
    scene.serves_here();
    assert!(scene.client.stop().unwrap().is_clean());
}

#[test]
fn a_disk_that_fills_up_leaves_the_tree_running() {
    require!("a_disk_that_fills_up_leaves_the_tree_running": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-full", Kind::Echo, 3);
    let host = scene.source();
    shell(
        &host,
        "mkdir /srv/small && mount -t tmpfs -o size=64m,mode=700 tmpfs /srv/small",
    );
    let mut command = scene.migrate(&[]);
    command.args([
        "park",
        &scene.workload.pid.to_string(),
        "--dir",
        "/srv/small",
    ]);
    command.env("MIGRATE_STOP_AT", "precopy");
    let running = Running::start(command);
    let parking = held(&host, "park");
    // Preflight found room; somebody else has taken it since.
    shell(
        &host,
        "dd if=/dev/zero of=/srv/small/other bs=1M 2>/dev/null; true",
    );
    kill(parking, Signal::SIGCONT).unwrap();
    let ended = running.finish();
    ended.expect(ROLLED_BACK, &["No space left", "as before"]);
    scene.serves_here();
    let left: Vec<PathBuf> = fs::read_dir(host.path("/srv/small"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(scene.client.stop().unwrap().is_clean());
}

/// Kills the CRIU that waits for its images under a `migrate`.
fn kill_criu_of(migrate: nix::unistd::Pid) {
    let mut killed = 0;
    for task in fs::read_dir(format!("/proc/{migrate}/task")).unwrap() {
        let children = fs::read_to_string(task.unwrap().path().join("children")).unwrap();
        for child in children.split_whitespace() {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if name.trim() == "criu" {
                let child = nix::unistd::Pid::from_raw(child.parse().unwrap());
                kill(child, Signal::SIGKILL).unwrap();
                killed += 1;
            }
        }
    }
    assert_eq!(killed, 1);
}

#[test]
fn what_cannot_be_resumed_waits_on() {
    require!("what_cannot_be_resumed_waits_on": root, tcx, criu, migrate);
    let lab = scoped("park-refused");
    let host = lab.host(HostName::Host1);
    let resets = reset_connections(&lab.host(HostName::Client)).unwrap();
    // A program of its own, to be upgraded.
    fs::copy(program("echo-server"), host.path("/srv/echo-server")).unwrap();
    let listen = format!("{WORKLOAD_V4}:7000");
    let pid = host
        .spawn_detached(["/srv/echo-server", &listen], "/dev/null")
        .unwrap();
    assert!(eventually(WITHIN, || listens(&host, 7000)));
    let client = lab.host(HostName::Client);
    let arguments = ["echo", "--addr", &listen, "--connections", "4"];
    let arguments = arguments.iter().chain(&PATIENT);
    let mut client = StrictClient::start(&client, arguments).unwrap();
    serves_old_connections(&mut client);
    make_directory(&host);
    parks(&host, &[pid], &["--name", "echo"]);

    let set = host.path(DIR).join("echo");
    let refused = |words: &[&str]| {
        let ended = run(&host, &["resume", "--dir", DIR, "--name", "echo"]);
        println!("{}", ended.text());
        ended.expect(REFUSED, words);
        assert!(!runs(&host, pid), "{ended:#?}");
        let status = succeeds(&host, &["status"]);
        assert!(
            status.stdout.contains("waits with a parked tree"),
            "{status:#?}"
        );
    };

    // Another directory, another name.
    run(&host, &["resume", "--dir", "/srv/none"]).expect(REFUSED, &["does not exist"]);
    let ended = run(&host, &["resume", "--dir", DIR, "--name", "other"]);
    ended.expect(REFUSED, &["holds no parked tree", "--list"]);

    // Torn or altered.
    let pages = set.join("images/pages-1.img");
    let flip = |content: &mut Vec<u8>| {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    };
    with(&pages, flip, || {
        refused(&["pages-1.img", "its content has changed"])
    });
    with(
        &pages,
        |c| c.truncate(4096),
        || refused(&["pages-1.img", "it has 4096 bytes"]),
    );
    let core = set.join(format!("images/core-{pid}.img"));
    with(&core, flip, || {
        refused(&["core-", "its content has changed"])
    });
    fs::write(set.join("images/more.img"), "").unwrap();
    refused(&["more.img", "it was not there"]);
    fs::remove_file(set.join("images/more.img")).unwrap();

    // Half-written, of another version, of another machine.
    let manifest = set.join("manifest.json");
    with(
        &manifest,
        |c| c.truncate(c.len() / 2),
        || refused(&["only a part of one"]),
    );
    fs::rename(&manifest, set.join("elsewhere")).unwrap();
    refused(&["has no manifest"]);
    fs::rename(set.join("elsewhere"), &manifest).unwrap();
    with(&manifest, edit("\"version\":1", "\"version\":2"), || {
        refused(&["version 2", "resume it with migrate"]);
    });
    with(&manifest, another_machine(&manifest), || {
        refused(&["parked on another machine", "--force"]);
    });

    // Before the network.
    shell(
        &host,
        &format!("ip address del {WORKLOAD_V4}/24 dev {INTERFACE}"),
    );
    refused(&[
        "10.77.0.100",
        "is not on this host",
        "ip address add 10.77.0.100/",
    ]);
    shell(
        &host,
        &format!("ip address add {WORKLOAD_V4}/24 dev {INTERFACE}"),
    );

    // A PID that somebody else has by now.
    let taker = host
        .exec([
            "sh",
            "-c",
            &format!(
                "echo {} >/proc/sys/kernel/ns_last_pid; sleep 600 >/dev/null 2>&1 & echo $!",
                pid - 1
            ),
        ])
        .unwrap();
    let taker = String::from_utf8(taker.stdout).unwrap();
    assert_eq!(taker.trim(), pid.to_string());
    // Until then it has the shell's name.
    assert!(eventually(WITHIN, || process_name(&host, pid) == "sleep"));
    let ended = run(&host, &["resume", "--dir", DIR, "--name", "echo"]);
    ended.expect(
        REFUSED,
        &[
            "is taken on this host by sleep",
            "stop or restart what has it",
        ],
    );
    shell(&host, &format!("kill -9 {pid}"));
    assert!(eventually(WITHIN, || !host
        .path(format!("/proc/{pid}"))
        .exists()));

    // Files upgraded, as maintenance does.
    fs::rename(host.path("/srv/echo-server"), host.path("/srv/former")).unwrap();
    fs::copy("/bin/true", host.path("/srv/echo-server")).unwrap();
    refused(&[
        "/srv/echo-server",
        "from before an upgrade",
        "put that version",
    ]);
    fs::rename(host.path("/srv/former"), host.path("/srv/echo-server")).unwrap();

    // Nothing of this has harmed it, and it comes back once.
    succeeds(&host, &["resume", "--dir", DIR, "--name", "echo"]);
    serves_old_connections(&mut client);
    let ended = run(&host, &["resume", "--dir", DIR, "--name", "echo"]);
    ended.expect(REFUSED, &["were removed when the tree was resumed"]);
    clean_client(&lab, client, resets);
}

#[test]
fn a_tree_comes_back_twice_only_by_force() {
    require!("a_tree_comes_back_twice_only_by_force": root, tcx, criu, migrate);
    let lab = scoped("park-twice");
    let host = lab.host(HostName::Host1);
    let workload = Workload::start(Kind::ShellLoop, &lab).unwrap();
    make_directory(&host);
    parks(&host, &[workload.pid], &["--name", "loop"]);
    let occupied = Workload::start(Kind::ShellLoop, &lab).unwrap();
    let pid = occupied.pid.to_string();
    run(&host, &["park", &pid, "--dir", DIR, "--name", "loop"])
        .expect(REFUSED, &["holds a parked tree already"]);
    assert!(runs(&host, occupied.pid));
    let resume = ["resume", "--dir", DIR, "--name", "loop", "--keep"];
    succeeds(&host, &resume);
    let count = workload.count(&host).unwrap();
    shell(&host, &format!("kill -9 {}", workload.pid));
    let gone = || !host.path(format!("/proc/{}", workload.pid)).exists();
    assert!(eventually(WITHIN, gone));
    run(&host, &resume).expect(REFUSED, &["was resumed before", "--force"]);
    assert!(!runs(&host, workload.pid));
    succeeds(
        &host,
        &["resume", "--dir", DIR, "--name", "loop", "--force"],
    );
    // Back in time, as was said.
    assert!(workload.count(&host).unwrap() > 0 && count > 0);
}

#[test]
fn a_failed_reboot_brings_the_trees_back() {
    require!("a_failed_reboot_brings_the_trees_back": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-abort", Kind::Echo, 3);
    let host = scene.source();
    make_directory(&host);
    let pid = scene.workload.pid.to_string();
    let maintain = |command: &str| {
        run(
            &host,
            &["maintenance", &pid, "--dir", DIR, "--reboot-cmd", command],
        )
    };
    let ended = maintain("exit 3");
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    assert!(ended.text().contains("`exit 3` failed"), "{ended:#?}");
    serves_old_connections(&mut scene.client);
    // While it waits for the end, the tree is away; an operator takes it back.
    let mut command = host.command("migrate");
    command.args(["maintenance", &pid, "--dir", DIR, "--reboot-cmd", "true"]);
    let running = Running::start(command);
    let waits = || {
        host.path(DIR)
            .join(format!("echo-server-{pid}/manifest.json"))
            .exists()
    };
    assert!(eventually(WITHIN, || waits() && !runs(&host, scene.workload.pid)));
    let migrate = runner(&host, "maintenance");
    kill(migrate, Signal::SIGINT).unwrap();
    let ended = running.finish();
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    assert!(ended.text().contains("interrupted"), "{ended:#?}");
    serves_old_connections(&mut scene.client);
    // A command that has said yes and has done nothing.
    let ended = run(
        &host,
        &[
            "maintenance",
            &pid,
            "--dir",
            DIR,
            "--reboot-cmd",
            "true",
            "--grace",
            "0",
        ],
    );
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    let text = ended.text();
    assert!(
        text.contains("has not ended this kernel within 0 s"),
        "{text}"
    );
    serves_old_connections(&mut scene.client);
    assert!(scene.client.stop().unwrap().is_clean());
}

/// Whenever the word comes: what runs is back, and nothing ends the kernel.
#[test]
fn who_interrupts_a_maintenance_has_all_trees_back() {
    require!("who_interrupts_a_maintenance_has_all_trees_back": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-interrupt", Kind::Echo, 3);
    let host = scene.source();
    let lonely = Workload::start(Kind::ShellLoop, &scene.lab).unwrap();
    make_directory(&host);
    let [echo, lonely] = [scene.workload.pid, lonely.pid];
    let stopped_with = |pids: &[i32], signal: Signal| {
        let mut command = host.command("migrate");
        command.args(["maintenance", "--dir", DIR]);
        command.args(["--reboot-cmd", "touch /srv/rebooted; exec sleep 600"]);
        command.args(pids.iter().map(ToString::to_string));
        command.env("MIGRATE_STOP_AT", "parked");
        let running = Running::start(command);
        let maintaining = held(&host, "maintenance");
        kill(maintaining, signal).unwrap();
        kill(maintaining, Signal::SIGCONT).unwrap();
        let ended = running.finish();
        assert!(!host.path("/srv/rebooted").exists(), "{ended:#?}");
        ended
    };
    // The first of two is on the disk; the second has not been touched.
    let ended = stopped_with(&[echo, lonely], Signal::SIGINT);
    assert_eq!(ended.status.code(), Some(INTERRUPTED), "{ended:#?}");
    assert!(runs(&host, echo) && runs(&host, lonely), "{ended:#?}");
    serves_old_connections(&mut scene.client);
    // The last one is: nothing but the command is left.
    let ended = stopped_with(&[echo], Signal::SIGINT);
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    assert!(ended.text().contains("interrupted"), "{ended:#?}");
    assert!(runs(&host, echo), "{ended:#?}");
    serves_old_connections(&mut scene.client);
    // A system that goes down has its trees parked.
    let ended = stopped_with(&[echo], Signal::SIGTERM);
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    assert!(ended.text().contains("the trees stay parked"), "{ended:#?}");
    assert!(!runs(&host, echo), "{ended:#?}");
    succeeds(&host, &["resume", "--dir", DIR]);
    serves_old_connections(&mut scene.client);
    assert!(scene.client.stop().unwrap().is_clean());
}

#[test]
fn marked_trees_are_parked_together() {
    require!("marked_trees_are_parked_together": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-marked", Kind::Echo, 3);
    let host = scene.source();
    let lonely = Workload::start(Kind::ShellLoop, &scene.lab).unwrap();
    let (echo, lonely) = (scene.workload.pid, lonely.pid);
    make_directory(&host);
    let maintain = ["maintenance", "--dir", DIR, "--reboot-cmd", "exit 3"];
    run(&host, &maintain).expect(REFUSED, &["nothing is marked", "migrate mark PID"]);
    let mark = |pid: i32, more: &[&str]| {
        let pid = pid.to_string();
        run(&host, &[&["mark", &pid, "--dir", DIR], more].concat())
    };
    mark(4_194_303, &[]).expect(REFUSED, &["4194303"]);
    for (pid, name) in [(echo, "front"), (lonely, "loop")] {
        assert_eq!(mark(pid, &["--name", name]).status.code(), Some(0));
    }
    mark(echo, &["--name", "again"]).expect(REFUSED, &["marked as front", "migrate unmark front"]);
    let listed = || succeeds(&host, &["mark", "--dir", DIR]).stdout;
    let both = format!("front: process {echo}, runs\nloop: process {lonely}, runs\n");
    assert_eq!(listed(), both);

    // Both leave and, as there is no reboot, both come back, and are marked as before.
    for _ in 0..2 {
        let ended = run(&host, &maintain);
        assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
        assert_eq!(
            ended.stdout.matches("is parked in").count(),
            2,
            "{ended:#?}"
        );
        assert_eq!(ended.stdout.matches("runs again").count(), 2, "{ended:#?}");
        assert_eq!(listed(), both);
        serves_old_connections(&mut scene.client);
    }

    // Parked under another name it is the tree that was marked all the same.
    parks(&host, &[echo], &["--name", "elsewhere"]);
    succeeds(&host, &["resume", "--dir", DIR, "--name", "elsewhere"]);
    assert_eq!(listed(), both);
    run(
        &host,
        &[
            "park",
            &echo.to_string(),
            "--dir",
            DIR,
            "--name",
            "loop.tree",
        ],
    )
    .expect(REFUSED, &["loop.tree", "marks a tree"]);

    let torn = host.path(DIR).join("front.tree");
    with(
        &torn,
        |c| c.truncate(c.len() / 2),
        || {
            run(&host, &maintain).expect(REFUSED, &["front.tree is no mark", "mark the tree anew"]);
        },
    );

    // One that has ended is not passed over.
    shell(&host, &format!("kill -9 {lonely}"));
    assert!(eventually(WITHIN, || !runs(&host, lonely)));
    run(&host, &maintain).expect(
        REFUSED,
        &["marked as loop", "does not run", "migrate unmark loop"],
    );
    assert!(runs(&host, echo));
    succeeds(&host, &["unmark", "loop", "--dir", DIR]);
    run(&host, &["unmark", "loop", "--dir", DIR]).expect(REFUSED, &["nothing is marked as loop"]);
    let ended = run(&host, &maintain);
    assert_eq!(ended.stdout.matches("runs again").count(), 1, "{ended:#?}");
    serves_old_connections(&mut scene.client);
    assert!(scene.client.stop().unwrap().is_clean());
}

#[test]
fn a_killed_park_or_resume_leaves_one_tree() {
    require!("a_killed_park_or_resume_leaves_one_tree": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-killed", Kind::Echo, 3);
    let host = scene.source();
    let pid = scene.workload.pid;
    make_directory(&host);
    let killed_at = |verb: &str, moment: &str| {
        println!("== {verb} killed at {moment}");
        let mut command = host.command("migrate");
        command.args([verb, "--dir", DIR, "--name", "echo"]);
        if verb == "park" {
            command.arg(pid.to_string());
        }
        command.env("MIGRATE_STOP_AT", moment);
        let running = Running::start(command);
        kill(held(&host, verb), Signal::SIGKILL).unwrap();
        let ended = running.finish();
        assert_eq!(ended.status.code(), None, "{ended:#?}");
        assert!(eventually(WITHIN, || guards(&host).is_empty()));
    };
    // Before the manifest is there the tree runs on.
    for moment in ["prepare", "freeze", "restore", "handover", "sealed"] {
        killed_at("park", moment);
        assert!(runs(&host, pid), "{moment}");
        serves_old_connections(&mut scene.client);
    }
    // With it the tree is parked.
    killed_at("park", "parked");
    assert!(eventually(WITHIN, || !runs(&host, pid)));
    // Until it is let go it waits.
    for moment in ["resume-restored", "resume-marked", "owned"] {
        killed_at("resume", moment);
        assert!(eventually(WITHIN, || !runs(&host, pid)), "{moment}");
        succeeds(&host, &["guard-boot", "--dir", DIR]);
    }
    // Then it runs, and the set cannot be used a second time.
    killed_at("resume", "running");
    assert!(runs(&host, pid));
    serves_old_connections(&mut scene.client);
    let ended = run(&host, &["resume", "--dir", DIR, "--name", "echo"]);
    // Whether it came to clear away the images is a race within it.
    ended.expect(REFUSED, &[]);
    let text = ended.text();
    let said = [
        "earlier resume was cut off",
        "were removed when the tree was resumed",
    ];
    assert!(said.iter().any(|words| text.contains(words)), "{text}");
    assert!(scene.client.stop().unwrap().is_clean());
}

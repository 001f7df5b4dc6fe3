//! A tree that maps, moves, gives back, protects and forks at random all
//! through its migration, and checks every byte of itself.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use migrate_test_hosts::{Host, HostName, Lab, LabGuard, WORKLOAD_V4};
use migrate_tests::client::program;
use migrate_tests::field::Shared;
use migrate_tests::hosts::{eventually, listens, runs};
use migrate_tests::migration::{Migration, arrives, migrate_as_given, print_logs};
use migrate_tests::require;

/// For a step that takes milliseconds, and for the last check of everything.
const SOON: Duration = Duration::from_secs(60);
const PORT: u16 = 7100;
/// Steps between two moves: long enough for children of every kind.
const STEPS: u64 = 400;

/// A lab that no other test has.
fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("{test}-{}", std::process::id())).unwrap()
}

/// `memory-churn`, and the one connection to it.
struct Churn<'a> {
    pid: i32,
    seed: u64,
    shared: &'a Shared,
    peer: BufReader<TcpStream>,
    /// Where it may be.
    hosts: [Host; 2],
}

impl<'a> Churn<'a> {
    fn start(lab: &Lab, seed: u64, shared: &'a Shared) -> Self {
        let host = lab.host(HostName::Host1);
        let address = SocketAddr::new(WORKLOAD_V4.into(), PORT);
        let argv = [
            program("memory-churn").display().to_string(),
            "serve".to_owned(),
            address.to_string(),
            seed.to_string(),
            shared.text_path("wrong"),
        ];
        let pid = host.spawn_detached(argv, "/dev/null").unwrap();
        assert!(eventually(SOON, || listens(&host, PORT)), "seed {seed}");
        let client = lab.host(HostName::Client);
        let peer = client
            .in_network(|| TcpStream::connect(address))
            .unwrap()
            .unwrap();
        peer.set_read_timeout(Some(SOON)).unwrap();
        Self {
            pid,
            seed,
            shared,
            peer: BufReader::new(peer),
            hosts: [host, lab.host(HostName::Host2)],
        }
    }

    fn ask(&mut self, question: u8) -> String {
        self.peer.get_mut().write_all(&[question]).unwrap();
        let mut answer = String::new();
        let read = self.peer.read_line(&mut answer);
        if read.is_err() || !answer.starts_with("steps ") {
            let children: Vec<String> = std::fs::read_dir(self.shared.path("."))
                .unwrap()
                .map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap())
                .collect();
            self.hosts.iter().for_each(print_logs);
            panic!("seed {}: {answer:?} {read:?} {children:#?}", self.seed);
        }
        answer
    }

    /// Steps and forks so far.
    fn progress(&mut self) -> (u64, u64) {
        let answer = self.ask(b'?');
        let words: Vec<&str> = answer.split_whitespace().collect();
        (words[1].parse().unwrap(), words[3].parse().unwrap())
    }

    /// Goes on for a while, wherever it is.
    fn goes_on(&mut self) {
        let deadline = Instant::now() + SOON;
        let (first, _) = self.progress();
        while self.progress().0 < first + STEPS {
            assert!(Instant::now() < deadline, "seed {} stands still", self.seed);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn tries(&mut self, lab: &Lab, from: HostName, to: HostName, more: &[&str]) -> Migration {
        let source = lab.host(from);
        let pid = self.pid.to_string();
        let arguments = [
            "--engine",
            "uffd",
            "--max-iterations",
            "4",
            "--max-blackout",
            "60",
            "--to",
        ];
        let arguments = [&arguments[..], &[to.as_str()], more, &[&pid]].concat();
        migrate_as_given(&source, arguments).unwrap()
    }

    fn moves(&mut self, lab: &Lab, from: HostName, to: HostName, more: &[&str]) {
        let (source, destination) = (lab.host(from), lab.host(to));
        let moved = self.tries(lab, from, to, more);
        if moved.code != Some(0) {
            println!("seed {}", self.seed);
            print_logs(&source);
            print_logs(&destination);
        }
        let report = moved.expect_committed();
        println!(
            "seed {}: {} rounds, {} pages, {} while frozen",
            self.seed, report.rounds, report.pages, report.frozen_pages
        );
        assert!(report.rounds >= 1, "{report:?}");
        assert!(runs(&destination, self.pid));
    }

    /// All of it is as it must be, down to the last child.
    fn ends(mut self, host: &Host) {
        let (_, forks) = self.progress();
        assert!(forks > 0, "seed {}", self.seed);
        self.ask(b'.');
        let seed = self.seed;
        assert!(eventually(SOON, || !runs(host, self.pid)), "seed {seed}");
        assert!(self.shared.read(".").is_empty(), "seed {seed}");
    }
}

/// There with every page compared by the hosts, and back without.
fn churns(seeds: std::ops::Range<u64>) {
    let lab = lab(&format!("churn-{}", seeds.start));
    for seed in seeds {
        let shared = Shared::new("churn").unwrap();
        let mut churn = Churn::start(&lab, seed, &shared);
        churn.goes_on();
        let verify = ["--restore", "eager", "--verify"];
        churn.moves(&lab, HostName::Host1, HostName::Host2, &verify);
        churn.goes_on();
        let back = ["--restore", "eager"];
        churn.moves(&lab, HostName::Host2, HostName::Host1, &back);
        churn.goes_on();
        churn.ends(&lab.host(HostName::Host1));
    }
}

/// The same while memory arrives. From the freeze until all of it is there the
/// tree does nothing that the kernel reports to nobody; see the limits in
/// docs/ARCHITECTURE.md.
fn churns_while_memory_arrives(seeds: std::ops::Range<u64>) {
    let lab = lab(&format!("churn-lazy-{}", seeds.start));
    // Others by request: MIGRATE_TEST_SEEDS=12,12,12.
    let seeds: Vec<u64> = match std::env::var("MIGRATE_TEST_SEEDS") {
        Ok(list) => list.split(',').map(|seed| seed.parse().unwrap()).collect(),
        Err(_) => seeds.collect(),
    };
    for seed in seeds {
        let shared = Shared::new("churn").unwrap();
        let mut churn = Churn::start(&lab, seed, &shared);
        churn.goes_on();
        let hops = [
            (HostName::Host1, HostName::Host2, &["--verify"][..]),
            (HostName::Host2, HostName::Host1, &[]),
        ];
        for (from, to, more) in hops {
            churn.ask(b'c');
            churn.moves(&lab, from, to, &[&["--restore", "lazy"], more].concat());
            churn.goes_on();
            let complete = || !arrives(&lab.host(to));
            assert!(eventually(SOON, complete), "seed {seed}");
            churn.ask(b'w');
            churn.goes_on();
        }
        churn.ends(&lab.host(HostName::Host1));
    }
}

/// The same with what was written last still on the source when it runs. Some memory cannot
/// wait (locked memory of relatives, `MADV_WIPEONFORK`): then it stays, and goes on. Returns
/// how often it moved.
fn churns_before_its_memory_follows(seeds: std::ops::Range<u64>) -> usize {
    let mut moves = 0;
    for seed in seeds {
        // The last seed's address may have stayed on the other host.
        let lab = lab(&format!("churn-late-{seed}"));
        let shared = Shared::new("churn").unwrap();
        let mut churn = Churn::start(&lab, seed, &shared);
        churn.goes_on();
        let (mut from, mut to) = (HostName::Host1, HostName::Host2);
        for more in [&["--verify"][..], &[], &["--streams", "1"]] {
            churn.ask(b'c');
            let late = ["--restore", "lazy", "--postcopy"];
            let tried = churn.tries(&lab, from, to, &[&late[..], more].concat());
            let outcome = tried.events.last().unwrap()["outcome"].clone();
            println!(
                "seed {seed}: {outcome} {:?}",
                tried
                    .events
                    .iter()
                    .rev()
                    .find_map(|event| event["error"].as_str())
            );
            if outcome == "committed" {
                moves += 1;
                std::mem::swap(&mut from, &mut to);
            } else {
                assert_eq!(outcome, "rolled_back", "{tried:#?}");
            }
            churn.goes_on();
            let complete = || !arrives(&lab.host(from));
            assert!(eventually(SOON, complete), "seed {seed}");
            churn.ask(b'w');
            churn.goes_on();
        }
        churn.ends(&lab.host(from));
    }
    moves
}

#[test]
fn churning_memory_moves_whole_seeds_1_to_5() {
    require!("churning_memory_moves_whole_seeds_1_to_5": root, tcx, criu, migrate);
    churns(1..6);
}

#[test]
fn churning_memory_moves_whole_seeds_6_to_10() {
    require!("churning_memory_moves_whole_seeds_6_to_10": root, tcx, criu, migrate);
    churns(6..11);
}

#[test]
fn churning_memory_arrives_whole_seeds_11_to_15() {
    require!("churning_memory_arrives_whole_seeds_11_to_15": root, tcx, criu, migrate);
    churns_while_memory_arrives(11..16);
}

#[test]
fn churning_memory_arrives_whole_seeds_16_to_20() {
    require!("churning_memory_arrives_whole_seeds_16_to_20": root, tcx, criu, migrate);
    churns_while_memory_arrives(16..21);
}

#[test]
fn churning_memory_follows_whole_seeds_21_to_23() {
    require!("churning_memory_follows_whole_seeds_21_to_23": root, tcx, criu, migrate);
    let moves = churns_before_its_memory_follows(21..24);
    assert!(moves > 0, "nothing was tried");
}

//! Processes with something about them that is in the way of reading their
//! memory or of moving them: either they move whole, or `migrate` says what is
//! in the way, and they run on.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::os::unix::fs::FileExt as _;

use migrate_core::Phase;
use migrate_core::wire::PAGE_BYTES;
use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::client::program;
use migrate_tests::field::{Shared, contiguous, grows, output, signal};
use migrate_tests::hosts::runs;
use migrate_tests::migration::{Migration, migrate, print_logs};
use migrate_tests::refusals::{self, REFUSED, ROLLED_BACK, clean};
use migrate_tests::require;

/// A process of `odd-memory`.
struct Odd {
    pid: i32,
    shared: Shared,
    lab: LabGuard,
}

impl Odd {
    /// Of the 8 MiB that it fills.
    const PAGES: u64 = 2048;

    fn start(mode: &str) -> Self {
        Self::start_below(mode, &[])
    }

    /// With other words before its own.
    fn start_below(mode: &str, before: &[&str]) -> Self {
        let name = format!("odd-{mode}{}-{}", before.len(), std::process::id());
        let lab = Lab::scoped(&name).unwrap();
        let shared = Shared::new(mode).unwrap();
        let own = program("odd-memory").display().to_string();
        let log = shared.text_path("log");
        let argv = [before, &[&own, mode, &log]].concat();
        let host = lab.host(HostName::Host1);
        let pid = host.spawn_detached(argv, "/dev/null").unwrap();
        let odd = Self { pid, shared, lab };
        odd.goes_on();
        odd
    }

    fn source(&self) -> Host {
        self.lab.host(HostName::Host1)
    }

    /// It counts on and has not missed or repeated a number.
    fn goes_on(&self) {
        let log = self.shared.path("log");
        assert!(grows(&log, 20), "{}", self.shared.read("log"));
        contiguous(&self.shared.read("log"));
    }

    fn migrate(&self, more: &[&str]) -> Migration {
        let pid = self.pid.to_string();
        let arguments = [more, &["--max-blackout", "60", "--to", "host2", &pid]].concat();
        migrate(&self.source(), arguments).unwrap()
    }

    /// Preflight says `words` and the process does not notice.
    fn is_refused(&self, words: &str) {
        let refused = self.migrate(&[]);
        let said = format!("{:?}", refused.events);
        assert_eq!(refused.code, Some(REFUSED), "{refused:#?}");
        assert!(said.contains(words), "{said}");
        assert!(runs(&self.source(), self.pid));
        self.goes_on();
        clean(&self.source());
    }

    /// It moves in rounds, with every page compared.
    fn moves(&self) -> Migration {
        let moved = self.migrate(&["--engine", "uffd"]);
        let destination = self.lab.host(HostName::Host2);
        if moved.code != Some(0) {
            print_logs(&self.source());
            print_logs(&destination);
        }
        let report = moved.expect_committed();
        assert!(report.rounds >= 1, "{report:?}");
        assert!(runs(&destination, self.pid));
        self.goes_on();
        moved
    }
}

/// What it has warned of.
fn warnings(migration: &Migration) -> Vec<&str> {
    let events = migration.events.iter();
    let warnings = events.filter(|event| event["event"] == "warning");
    warnings
        .filter_map(|event| event["text"].as_str())
        .collect()
}

#[test]
fn a_process_with_a_userfaultfd_is_refused() {
    require!("a_process_with_a_userfaultfd_is_refused": root, tcx, criu, migrate);
    Odd::start("uffd").is_refused("userfaultfd");
}

#[test]
fn a_process_with_an_io_uring_is_refused() {
    require!("a_process_with_an_io_uring_is_refused": root, tcx, criu, migrate);
    Odd::start("ring").is_refused("io_uring");
}

#[test]
fn a_traced_process_is_refused() {
    require!("a_traced_process_is_refused": root, tcx, criu, migrate);
    Odd::start("traced").is_refused("is traced by");
}

#[test]
fn a_guard_page_before_code_is_refused() {
    require!("a_guard_page_before_code_is_refused": root, tcx, criu, migrate);
    Odd::start("guarded").is_refused("begins with a guard page");
}

#[test]
fn a_guard_page_in_locked_memory_is_refused() {
    require!("a_guard_page_in_locked_memory_is_refused": root, tcx, criu, migrate);
    Odd::start("lockguard").is_refused("guard page (MADV_GUARD_INSTALL) in locked memory");
}

#[test]
fn system_v_memory_of_the_host_is_refused() {
    require!("system_v_memory_of_the_host_is_refused": root, tcx, criu, migrate);
    Odd::start("sysv").is_refused("unshare --ipc");
}

#[test]
fn system_v_memory_moves_with_its_namespace() {
    require!("system_v_memory_moves_with_its_namespace": root, tcx, criu, migrate);
    Odd::start_below("sysv", &["unshare", "--ipc"]).moves();
}

#[test]
fn a_process_in_strict_mode_moves() {
    require!("a_process_in_strict_mode_moves": root, tcx, criu, migrate);
    Odd::start("strict").moves();
}

#[test]
fn a_filter_that_kills_at_our_calls_does_not() {
    require!("a_filter_that_kills_at_our_calls_does_not": root, tcx, criu, migrate);
    Odd::start("filter").moves();
}

#[test]
fn locked_memory_moves_and_stays_locked() {
    require!("locked_memory_moves_and_stays_locked": root, tcx, criu, migrate);
    let odd = Odd::start("locked");
    odd.moves();
    let destination = odd.lab.host(HostName::Host2);
    let status = output(&destination, ["cat", &format!("/proc/{}/status", odd.pid)]);
    let locked = status.lines().find(|line| line.starts_with("VmLck:"));
    assert!(!locked.unwrap().ends_with(" 0 kB"), "{status}");
}

#[test]
fn memory_that_devices_may_write_to_moves_whole_and_is_named() {
    require!("memory_that_devices_may_write_to_moves_whole_and_is_named": root, tcx, criu, migrate);
    let odd = Odd::start("direct");
    let moved = odd.moves();
    let [warning] = warnings(&moved)[..] else {
        panic!("{moved:?}");
    };
    let process = format!("process {} (odd-memory)", odd.pid);
    for words in [&process, "O_DIRECT", "whole at the freeze"] {
        assert!(warning.contains(words), "{words}: {warning}");
    }
    let report = moved.expect_committed();
    for round in &report.precopy {
        assert!(round.pages_whole >= Odd::PAGES, "{round:?}");
        assert_eq!(round.skipped_percent, 0, "{round:?}");
    }
    assert!(report.frozen_pages >= Odd::PAGES, "{report:?}");
}

#[test]
fn memory_that_is_tracked_is_no_news() {
    require!("memory_that_is_tracked_is_no_news": root, tcx, criu, migrate);
    let moved = Odd::start("plain").moves();
    assert!(warnings(&moved).is_empty(), "{moved:?}");
    let rounds = &moved.expect_committed().precopy;
    assert!(
        rounds.iter().all(|round| round.pages_whole == 0),
        "{rounds:?}"
    );
}

/// Huge pages that come and go as they are asked for.
struct HugePages(String);

impl HugePages {
    const SETTING: &'static str = "/proc/sys/vm/nr_overcommit_hugepages";

    fn allow() -> Option<Self> {
        let before = fs::read_to_string(Self::SETTING).ok()?;
        fs::write(Self::SETTING, "32").ok()?;
        Some(Self(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // What it was before cannot be refused.
        let _ = fs::write(Self::SETTING, &self.0);
    }
}

#[test]
fn huge_pages_move() {
    require!("huge_pages_move": root, tcx, criu, migrate);
    let Some(_allowed) = HugePages::allow() else {
        println!("SKIP huge_pages_move: this kernel has no huge pages to give");
        return;
    };
    let moved = Odd::start("huge").moves();
    let rounds = &moved.expect_committed().precopy;
    assert!(
        rounds.iter().all(|round| round.pages_whole >= Odd::PAGES),
        "{rounds:?}"
    );
}

#[test]
fn a_tree_that_forks_all_the_time_moves() {
    require!("a_tree_that_forks_all_the_time_moves": root, tcx, criu, migrate);
    let lab = Lab::scoped(&format!("odd-forks-{}", std::process::id())).unwrap();
    let shared = Shared::new("forks").unwrap();
    let program = format!(
        "i=0; while :; do i=$((i+1)); for n in 1 2 3 4; do \
         {{ sleep 0.01 || echo \"$? is no end of sleep\" >>{0}; }} & done; wait; \
         echo $i >>{0}; done",
        shared.text_path("log")
    );
    let source = lab.host(HostName::Host1);
    let pid = source
        .spawn_detached(["/bin/sh", "-c", &program], "/dev/null")
        .unwrap();
    let log = shared.path("log");
    assert!(grows(&log, 5));
    let arguments = ["--max-blackout", "60", "--to", "host2", &pid.to_string()];
    let moved = migrate(&source, arguments).unwrap();
    let _ = moved.expect_committed();
    assert!(runs(&lab.host(HostName::Host2), pid));
    assert!(grows(&log, 5));
    contiguous(&shared.read("log"));
}

#[test]
fn a_tree_that_ends_in_mid_round_is_named() {
    require!("a_tree_that_ends_in_mid_round_is_named": root, tcx, criu, migrate);
    let odd = Odd::start("plain");
    let mut command = odd.source().command("migrate");
    // The first round takes seconds.
    command.args(["--json", "--bandwidth", "4M", "--to", "host2"]);
    command.arg(odd.pid.to_string());
    let mut running = refusals::Running::start(command);
    assert!(running.await_started(Phase::Precopy));
    signal(&odd.source(), "KILL", odd.pid);
    let ended = running.finish();
    let gone = format!("process {} is gone", odd.pid);
    ended.expect(ROLLED_BACK, &[&gone]);
    clean(&odd.source());
    clean(&odd.lab.host(HostName::Host2));
}

#[test]
fn a_tree_that_outgrows_the_page_store_stays() {
    require!("a_tree_that_outgrows_the_page_store_stays": root, tcx, criu, migrate);
    let odd = Odd::start("growing");
    let destination = odd.lab.host(HostName::Host2);
    let mut command = odd.source().command("migrate");
    refusals::under_policy(&mut command, &destination, "memory_mib_max = 24\n");
    // The first round takes a second, in which the tree grows.
    command.args(["--json", "--bandwidth", "8M", "--to", "host2"]);
    command.arg(odd.pid.to_string());
    let mut running = refusals::Running::start(command);
    assert!(running.await_started(Phase::Precopy));
    signal(&odd.source(), "USR1", odd.pid);
    let ended = running.finish();
    let (full, way_out) = ("page store is full: 25165824 bytes", "memory_mib_max");
    ended.expect(ROLLED_BACK, &[full, way_out]);
    assert!(runs(&odd.source(), odd.pid));
    odd.goes_on();
    clean(&odd.source());
    clean(&destination);
    odd.moves();
}

/// Whether the kernel marks soft-dirty pages: one that was just written is.
fn has_soft_dirty() -> bool {
    const SOFT_DIRTY: u64 = 1 << 55;
    let written = vec![1_u8; 4 * PAGE_BYTES];
    let page = (written.as_ptr().addr() / PAGE_BYTES + 1) as u64;
    let mut entry = [0; 8];
    let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
    pagemap.read_exact_at(&mut entry, page * 8).unwrap();
    u64::from_ne_bytes(entry) & SOFT_DIRTY != 0
}

#[test]
fn soft_dirty_marks_are_used_or_missed() {
    require!("soft_dirty_marks_are_used_or_missed": root, tcx, criu, migrate);
    let odd = Odd::start("plain");
    let ended = odd.migrate(&["--engine", "soft-dirty"]);
    if has_soft_dirty() {
        let _ = ended.expect_committed();
        assert!(runs(&odd.lab.host(HostName::Host2), odd.pid));
    } else {
        let said = format!("{:?}", ended.events);
        assert_eq!(ended.code, Some(REFUSED), "{ended:#?}");
        assert!(said.contains("CONFIG_MEM_SOFT_DIRTY"), "{said}");
        assert!(runs(&odd.source(), odd.pid));
        clean(&odd.source());
    }
    odd.goes_on();
}

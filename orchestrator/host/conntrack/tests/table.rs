//! Entries in the table of a network namespace of the test's own.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use migrate_conntrack::{Table, entries, is_in_use};
use migrate_core::flow::Flow;
use migrate_core::tracked::{Tracked, Way};
use nix::sched::{CloneFlags, unshare};

fn flow(local: &str, remote: &str) -> Flow {
    Flow::new(local.parse().unwrap(), remote.parse().unwrap())
}

/// Runs on a thread with an empty table; `false` when this machine has none.
fn with_a_table(test: &str, run: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP {test}: needs root");
        return;
    }
    let name = test.to_owned();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        if std::fs::metadata("/proc/sys/net/netfilter").is_err() {
            println!("SKIP {name}: this kernel tracks no connections");
            return;
        }
        run();
    });
    thread.join().unwrap();
}

#[test]
fn an_entry_is_made_found_and_removed() {
    with_a_table("an_entry_is_made_found_and_removed", || {
        let mut table = Table::open().unwrap();
        for (local, remote) in [
            ("10.0.0.9:7000", "10.0.0.1:4000"),
            ("[fd00::9]:7000", "[fd00::1]:4000"),
        ] {
            let flow = flow(local, remote);
            assert_eq!(table.find(&flow).unwrap(), None);
            for accepted in [true, false] {
                let entry = Tracked {
                    window_scales: [7, 8],
                    tcp_flags: [0x23, 0x23],
                    timeout_s: 1000,
                    mark: 9,
                    ..Tracked::established(&flow, accepted)
                };
                // The second takes the place of the first.
                table.put(&entry).unwrap();
                let found = table.find(&flow).unwrap().unwrap();
                assert_eq!((found.original, found.reply), (entry.original, entry.reply));
                assert_eq!(found.status & entry.status, entry.status);
                assert_eq!(found.mark, 9);
                assert_eq!(found.tcp_state, entry.tcp_state);
                assert_eq!(found.window_scales, [7, 8]);
                assert!((900..=1000).contains(&found.timeout_s));
                assert_eq!(entries(|_| true).unwrap().len(), 1);
                if !accepted {
                    table.remove(&entry).unwrap();
                    table.remove(&entry).unwrap();
                }
                table.remove(&entry).unwrap();
            }
            assert_eq!(entries(|_| true).unwrap(), vec![]);
        }
    });
}

#[test]
fn translations_are_part_of_an_entry() {
    with_a_table("translations_are_part_of_an_entry", || {
        let way = |from: &str, to: &str| Way {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
        };
        let plain = Tracked::established(&flow("10.0.0.9:7000", "10.0.0.1:4000"), true);
        let redirected = Tracked {
            original: way("10.0.0.1:4000", "10.0.0.9:80"),
            ..plain.clone()
        };
        let masqueraded = Tracked {
            original: way("10.0.0.9:7000", "10.0.0.1:4001"),
            reply: way("10.0.0.1:4001", "10.0.0.2:7777"),
            ..plain
        };
        let mut table = Table::open().unwrap();
        for entry in [redirected, masqueraded] {
            table.put(&entry).unwrap();
            let found = entries(|found| found.original == entry.original).unwrap();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].reply, entry.reply);
            assert!(found[0].is_translated());
            table.remove(&entry).unwrap();
        }
    });
}

#[test]
fn an_empty_table_is_not_in_use() {
    with_a_table("an_empty_table_is_not_in_use", || {
        assert!(!is_in_use());
        let entry = Tracked::established(&flow("10.0.0.9:7000", "10.0.0.1:4000"), true);
        Table::open().unwrap().put(&entry).unwrap();
        assert!(is_in_use());
    });
}

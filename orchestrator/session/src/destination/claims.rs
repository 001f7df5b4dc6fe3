//! What migrations under way will need of this host. Their ids and ports are
//! free until the copies are made, so another preflight would find them free,
//! too, and the second of two copies would fail when its tree stands still
//! already.
//!
//! A claim is part of the destination's record: it ends with the migration, and
//! counts for as long as the agent that made it lives. What is left after that
//! are real processes, addresses and sockets, which preflight sees.

use migrate_core::facts::TreeFacts;
use migrate_core::journal::{Claims, Record, Side, Stage};
use migrate_core::preflight::Finding;
use migrate_net::rules::collide;

use crate::error::Error;
use crate::journal::{self, Journal};
use crate::state::State;
use crate::sweep::owner_alive;

/// What whoever comes second can do.
pub(crate) const WAY_OUT: &str =
    "wait until that migration has ended (`migrate status` there), then try again";

/// What the copy of a tree will take.
pub(super) fn of(tree: &TreeFacts) -> Claims {
    Claims {
        ids: migrate_proc::wanted_ids(tree).into_keys().collect(),
        listeners: tree.listeners.clone(),
    }
}

/// What of a tree's needs is claimed by other migrations, one refusal for each.
///
/// # Errors
///
/// The journal cannot be read.
pub(super) fn compare(
    state: &State,
    migration_id: &str,
    tree: &TreeFacts,
) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    for record in journal::all(state)? {
        let is_under_way = record.side == Side::Destination
            && matches!(record.stage, Stage::Preparing | Stage::Owned)
            && record.migration_id != migration_id
            && owner_alive(&record);
        if is_under_way {
            findings.extend(against(&record, tree));
        }
    }
    Ok(findings)
}

/// Puts a migration's record down, unless another one has claimed what it
/// needs since preflight, or has had its name: of two that come at once one is
/// the first.
///
/// # Errors
///
/// [`Error::Claimed`], [`Error::NameTaken`], or the record cannot be written.
pub(super) fn begin(state: &State, record: Record, tree: &TreeFacts) -> Result<Journal, Error> {
    let _lock = state.lock_claims()?;
    // A record tells a source whose the tree is. Nobody else may write over it.
    if journal::is_known(state, &record.migration_id)? {
        let migration_id = record.migration_id;
        return Err(Error::NameTaken { migration_id });
    }
    let claimed = compare(state, &record.migration_id, tree)?;
    if claimed.is_empty() {
        return Journal::begin(state, record);
    }
    let words = |finding: Finding| format!("{} {}", finding.subject, finding.finding);
    Err(Error::Claimed(claimed.into_iter().map(words).collect()))
}

fn against(theirs: &Record, tree: &TreeFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut refuse = |subject: String| {
        let Record { name, peer, .. } = theirs;
        let finding = format!("is claimed by {name}, which is on its way here from {peer}");
        findings.push(Finding::refused(subject, finding, WAY_OUT));
    };
    for (id, what) in migrate_proc::wanted_ids(tree) {
        if theirs.claims.ids.contains(&id) {
            refuse(format!("{what} {id}"));
        }
    }
    for address in &tree.addresses {
        if theirs.addresses.iter().any(|their| their.ip == address.ip) {
            refuse(format!("address {}", address.ip));
        }
    }
    let ends = (tree.listeners.iter().map(|l| (l.local, l.v6only)))
        .chain(tree.flows.iter().map(|flow| (flow.local, false)));
    let mut ports: Vec<u16> = ends
        .filter(|(local, v6only)| {
            let their = &theirs.claims.listeners;
            their
                .iter()
                .any(|their| collide(*local, *v6only, their.local, their.v6only))
        })
        .map(|(local, _)| local.port())
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
        .into_iter()
        .for_each(|port| refuse(format!("port {port}")));
    findings
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use migrate_core::Flow;
    use migrate_core::facts::{AddressFacts, ProcessFacts};
    use migrate_core::flow::Listener;
    use migrate_core::journal::RECORD_VERSION;
    use migrate_core::wire::NetworkLock;

    use super::*;

    /// A process of one thread that listens, with an address of its own.
    fn tree(pid: i32, listens: &str, ip: &str) -> TreeFacts {
        TreeFacts {
            root_pid: pid,
            processes: vec![ProcessFacts {
                pid,
                parent: 1,
                session: pid,
                group: pid,
                name: "redis".to_owned(),
                threads: vec![pid],
                start_ticks: 1,
                credentials: migrate_core::policy::Credentials::default(),
            }],
            listeners: vec![Listener {
                local: listens.parse().unwrap(),
                v6only: false,
            }],
            addresses: vec![AddressFacts {
                ip: ip.parse().unwrap(),
                prefix_len: 24,
                interface: "eth0".to_owned(),
            }],
            ..TreeFacts::default()
        }
    }

    /// Of an agent that lives: this process.
    fn record(id: &str, tree: &TreeFacts) -> Record {
        let owner_pid = std::process::id().cast_signed();
        Record {
            version: RECORD_VERSION,
            migration_id: id.to_owned(),
            side: Side::Destination,
            stage: Stage::Preparing,
            owner_pid,
            owner_start_ticks: migrate_proc::start_ticks(owner_pid).unwrap(),
            root_pid: tree.root_pid,
            pids: vec![tree.root_pid],
            name: "redis".to_owned(),
            peer: "host1".to_owned(),
            addresses: tree.addresses.clone(),
            images: None,
            fence: None,
            hold_down: None,
            route: None,
            withdrawn: None,
            network_lock: NetworkLock::Gate,
            home: None,
            claims: of(tree),
        }
    }

    fn state() -> (tempfile::TempDir, State) {
        let directory = tempfile::tempdir().unwrap();
        let state = State::at(directory.path()).unwrap();
        (directory, state)
    }

    fn subjects(state: &State, tree: &TreeFacts) -> Vec<String> {
        let findings = compare(state, "second", tree).unwrap();
        assert_eq!(
            migrate_core::preflight::refused(&findings),
            !findings.is_empty()
        );
        findings
            .into_iter()
            .map(|finding| finding.subject)
            .collect()
    }

    #[test]
    fn what_another_one_will_need_is_named() {
        let (_directory, state) = state();
        let first = tree(70, "10.77.0.100:7000", "10.77.0.100");
        let mut journal = begin(&state, record("first", &first), &first).unwrap();

        let other = tree(71, "10.77.0.101:7000", "10.77.0.101");
        assert_eq!(subjects(&state, &other), [""; 0]);
        let same_pid = tree(70, "10.77.0.101:7000", "10.77.0.101");
        assert_eq!(subjects(&state, &same_pid), ["pid 70"]);
        let same_address = tree(71, "10.77.0.100:7001", "10.77.0.100");
        assert_eq!(subjects(&state, &same_address), ["address 10.77.0.100"]);
        let same_port = tree(71, "0.0.0.0:7000", "10.77.0.101");
        assert_eq!(subjects(&state, &same_port), ["port 7000"]);
        // A connection's own end cannot be had beside a listener either.
        let mut bound = other.clone();
        let local: SocketAddr = "10.77.0.100:7000".parse().unwrap();
        bound.flows = vec![Flow::new(local, "10.77.0.1:9".parse().unwrap())];
        assert_eq!(subjects(&state, &bound), ["port 7000"]);
        // In nobody's way is a migration's own record.
        assert_eq!(compare(&state, "first", &first).unwrap(), []);

        journal.stage(Stage::Owned).unwrap();
        assert_eq!(subjects(&state, &same_pid), ["pid 70"]);
        // The copy itself is what preflight finds from here on.
        journal.stage(Stage::Done).unwrap();
        assert_eq!(subjects(&state, &same_pid), [""; 0]);
    }

    #[test]
    fn an_agent_that_has_died_claims_nothing() {
        let (_directory, state) = state();
        let first = tree(70, "10.77.0.100:7000", "10.77.0.100");
        let dead = Record {
            // No process starts that late.
            owner_start_ticks: u64::MAX,
            ..record("first", &first)
        };
        begin(&state, dead, &first).unwrap();
        assert_eq!(subjects(&state, &first), [""; 0]);
    }

    #[test]
    fn of_two_that_come_at_once_one_is_the_first() {
        let (_directory, state) = state();
        let tree = tree(70, "10.77.0.100:7000", "10.77.0.100");
        let began: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| {
                    let (state, tree) = (&state, &tree);
                    scope.spawn(move || begin(state, record(&format!("m-{number}"), tree), tree))
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(began.iter().filter(|one| one.is_ok()).count(), 1);
        for error in began.into_iter().filter_map(Result::err) {
            assert!(matches!(error, Error::Claimed(_)), "{error}");
            let words = "pid 70 is claimed by redis, which is on its way here from host1";
            assert!(error.to_string().starts_with(words), "{error}");
            assert_eq!(error.help().as_deref(), Some(WAY_OUT));
        }
    }

    /// Else whoever knows the name of a migration could have its source told
    /// that the copy never ran.
    #[test]
    fn nobody_writes_over_a_record() {
        let (_directory, state) = state();
        let first = tree(70, "10.77.0.100:7000", "10.77.0.100");
        let other = tree(71, "10.77.0.101:7001", "10.77.0.101");
        let again = || begin(&state, record("first", &other), &other).unwrap_err();
        let mut journal = begin(&state, record("first", &first), &first).unwrap();
        assert!(matches!(again(), Error::NameTaken { .. }));
        journal.stage(Stage::Owned).unwrap();
        journal.stage(Stage::Done).unwrap();
        assert!(matches!(again(), Error::NameTaken { .. }));
        journal::retire(&state, journal.record()).unwrap();
        assert!(matches!(again(), Error::NameTaken { .. }));
        assert_eq!(journal::verdict(&state, "first").unwrap(), Stage::Done);
    }
}

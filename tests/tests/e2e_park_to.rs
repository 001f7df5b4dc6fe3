//! Trees whose memory another host keeps while theirs boots, and what must hold
//! when that goes wrong.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use migrate_test_hosts::{Host, HostName, Lab};
use migrate_tests::client::StrictClient;
use migrate_tests::hosts::{ResetCapture, TcpCounts, eventually, reset_connections, runs};
use migrate_tests::migration::{no_gate_left, serves_old_connections};
use migrate_tests::parking::{
    DIR, PATIENT, WITHIN, another_machine, clean_client, comes_up, edit, goes_down, held,
    make_directory, run, succeeds, with,
};
use migrate_tests::refusals::{
    CONNECT, Ended, Held, INTERRUPTED, POLICY_FILE, REFUSED, ROLLED_BACK, Running, Scene,
    UNDECIDED, agent, driver, guards, image_mounts, is_over, is_stopped, runner, scoped, shell,
    unwall, wall,
};
use migrate_tests::require;
use migrate_tests::standing;
use migrate_tests::workload::{Kind, Workload};
use nix::sys::signal::{Signal, kill};

/// Where the keeper's policy has trees kept.
const KEPT: &str = "/srv/kept";

/// The name of the set in most tests.
const NAME: &str = "tree";

/// A host whose trees another one keeps.
struct Pair {
    host: Host,
    keeper: Host,
}

impl Pair {
    /// Their directories and the policy.
    fn prepare(host: Host, keeper: Host) -> Self {
        make_directory(&host);
        shell(&keeper, &format!("mkdir -m 700 {KEPT}"));
        let pair = Self { host, keeper };
        pair.policy(&format!("keep = '{KEPT}'"));
        pair
    }

    fn of(scene: &Scene) -> Self {
        Self::prepare(scene.source(), scene.destination())
    }

    fn policy(&self, text: &str) {
        fs::write(self.keeper.path(POLICY_FILE), text).unwrap();
    }

    /// `migrate` on the host, whose agents stop at `moment`, if at any.
    fn command(&self, arguments: &[&str], moment: Option<&str>) -> Command {
        let mut command = self.host.command("migrate");
        command.args(arguments);
        let stop = moment.map_or_else(String::new, |at| format!(" MIGRATE_STOP_AT={at}"));
        let agent = format!("env MIGRATE_AGENT_POLICY={POLICY_FILE}{stop} migrate");
        command.env("MIGRATE_REMOTE_COMMAND", agent);
        command
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        Running::start(self.command(arguments, None)).finish()
    }

    #[track_caller]
    fn succeeds(&self, arguments: &[&str]) -> Ended {
        let ended = self.run(arguments);
        assert_eq!(ended.status.code(), Some(0), "{arguments:?}: {ended:#?}");
        ended
    }

    fn park(&self, pid: i32, moment: Option<&str>) -> Command {
        let pid = pid.to_string();
        let arguments = ["park", &pid, "--dir", DIR, "--name", NAME, "--to", "host2"];
        self.command(&arguments, moment)
    }

    #[track_caller]
    fn parks(&self, pid: i32) -> Ended {
        let ended = Running::start(self.park(pid, None)).finish();
        assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
        self.is_parked(pid);
        ended
    }

    #[track_caller]
    fn is_parked(&self, pid: i32) {
        assert!(
            eventually(WITHIN, || !runs(&self.host, pid)),
            "{pid} is parked"
        );
        assert!(self.stub().join("manifest.json").exists());
        assert!(self.set().join("manifest.json").exists());
    }

    fn resume(&self, moment: Option<&str>) -> Command {
        self.command(&["resume", "--dir", DIR, "--name", NAME], moment)
    }

    #[track_caller]
    fn resumes(&self) -> Ended {
        let ended = Running::start(self.resume(None)).finish();
        assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
        ended
    }

    /// Refused, with these words, and with nothing changed.
    #[track_caller]
    fn refuses(&self, words: &[&str]) {
        Running::start(self.resume(None))
            .finish()
            .expect(REFUSED, words);
    }

    /// On the host.
    fn stub(&self) -> PathBuf {
        self.host.path(DIR).join(NAME)
    }

    /// On the keeper.
    fn set(&self) -> PathBuf {
        self.keeper.path(KEPT).join(NAME)
    }
}

#[test]
fn a_tree_that_another_host_keeps_comes_back_after_a_boot() {
    require!("a_tree_that_another_host_keeps_comes_back_after_a_boot": root, tcx, criu, migrate, redis, memcached, tcpdump);
    let lab = scoped("park-to");
    let peer = lab.host(HostName::Client);
    let resets = reset_connections(&peer).unwrap();
    let redis = Workload::start(Kind::Redis, &lab).unwrap();
    let keys = ["--keys", "20000", "--populate", "--verify"];
    let mut client = redis
        .client(&lab, 5, &[&keys[..], &PATIENT].concat())
        .unwrap();
    serves_old_connections(&mut client);
    let capture = ResetCapture::start(&peer).unwrap();
    let pair = Pair::prepare(lab.host(HostName::Host1), lab.host(HostName::Host2));
    let (host, keeper) = (&pair.host, &pair.keeper);

    let pid = redis.pid.to_string();
    let parked = pair.succeeds(&[
        "park",
        &pid,
        "--dir",
        DIR,
        "--name",
        NAME,
        "--to",
        "host2",
        "--streams",
        "3",
    ]);
    assert!(parked.stdout.contains("is parked on host2"), "{parked:#?}");
    assert!(parked.stdout.contains("5 peers"), "{parked:#?}");
    assert!(parked.stdout.contains("3 streams"), "{parked:#?}");
    pair.is_parked(redis.pid);
    // Memory is there and not here.
    assert!(pair.set().join("images/pages-1.img").exists());
    assert!(!pair.stub().join("images").exists());
    let list = succeeds(host, &["resume", "--list", "--dir", DIR]);
    assert!(list.stdout.contains("waits on host2"), "{list:#?}");

    goes_down(host);
    let guarded = succeeds(host, &["guard-boot", "--dir", DIR]);
    let said = "tree: nothing answers for 5 connections";
    assert!(guarded.stdout.contains(said), "{guarded:#?}");
    comes_up(host);
    // Peers ask again and hear nothing, in particular no reset.
    let sent_again = || TcpCounts::of(&peer).unwrap().retransmitted;
    let before = sent_again();
    assert!(eventually(WITHIN, || sent_again() > before + 3));

    // Without the keeper it waits on.
    wall(keeper, host);
    pair.run(&["resume", "--dir", DIR])
        .expect(CONNECT, &["host2", "was not resumed"]);
    unwall(keeper);
    assert!(!runs(host, redis.pid));
    let resumed = pair.succeeds(&["resume", "--dir", DIR]);
    assert!(resumed.stdout.contains("runs again"), "{resumed:#?}");
    serves_old_connections(&mut client);
    assert!(runs(host, redis.pid));
    no_gate_left(host);
    assert!(!pair.set().exists(), "nothing of it is kept");
    pair.refuses(&["were removed when the tree was resumed"]);

    // And once more, with another tree, into the same set and one more; this time they stay.
    let memcached = Workload::start(Kind::Memcached, &lab).unwrap();
    let second = memcached.client(&lab, 5, &PATIENT).unwrap();
    let mut clients = [client, second];
    clients.iter_mut().for_each(serves_old_connections);
    let other = memcached.pid.to_string();
    let named = ["--name", NAME, "--name", "other"];
    let park = [
        &["park", &pid, &other, "--dir", DIR, "--to", "host2"],
        &named[..],
    ]
    .concat();
    let parked = pair.succeeds(&park).stdout;
    assert_eq!(parked.matches("is parked on host2").count(), 2, "{parked}");
    pair.is_parked(redis.pid);
    assert!(eventually(WITHIN, || !runs(host, memcached.pid)));
    goes_down(host);
    let guarded = succeeds(host, &["guard-boot", "--dir", DIR]).stdout;
    let count = guarded.matches("nothing answers for 5 connections").count();
    assert_eq!(count, 2, "{guarded}");
    comes_up(host);
    let resumed = pair.succeeds(&["resume", "--dir", DIR, "--keep"]).stdout;
    assert_eq!(resumed.matches("runs again").count(), 2, "{resumed}");
    clients.iter_mut().for_each(serves_old_connections);
    for name in [NAME, "other"] {
        let pages = keeper.path(KEPT).join(name).join("images/pages-1.img");
        assert!(pages.exists(), "{name}");
    }
    pair.refuses(&["was resumed before"]);
    assert_eq!(capture.stop().unwrap(), Vec::<String>::new());
    for client in clients {
        clean_client(&lab, client, resets);
    }
}

#[test]
fn before_the_keeper_has_it_the_tree_runs_on() {
    require!("before_the_keeper_has_it_the_tree_runs_on": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-to-back", Kind::Echo, 3);
    let pair = Pair::of(&scene);
    let pid = scene.workload.pid;
    let id = pid.to_string();
    let mut runs_on = || {
        assert!(eventually(WITHIN, || guards(&pair.host).is_empty()));
        assert!(runs(&pair.host, pid));
        assert!(!pair.stub().exists(), "no stub is left");
        serves_old_connections(&mut scene.client);
    };
    for name in ["../tree", "a/b", ".hidden"] {
        let park = ["park", &id, "--dir", DIR, "--name", name, "--to", "host2"];
        pair.run(&park).expect(2, &["cannot name a parked tree"]);
    }
    let park = || Running::start(pair.park(pid, None)).finish();
    pair.policy("users = [0]");
    park().expect(REFUSED, &["does not allow trees to be kept here"]);
    runs_on();
    pair.policy("keep = 'srv/kept'");
    park().expect(REFUSED, &["srv/kept", "not an absolute path"]);
    pair.policy("keep = '/srv/nowhere'");
    park().expect(REFUSED, &["/srv/nowhere does not exist"]);
    pair.policy(&format!("keep = '{KEPT}'\nmemory_mib_max = 0"));
    park().expect(REFUSED, &["MiB of memory, only 0 MiB"]);
    runs_on();
    pair.policy(&format!("keep = '{KEPT}'"));

    // The keeper dies with everything on its disk.
    let running = Running::start(pair.park(pid, Some("shown")));
    let keeper = agent(&pair.keeper);
    assert!(eventually(WITHIN, || is_stopped(keeper)));
    kill(keeper, Signal::SIGKILL).unwrap();
    let ended = running.finish();
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    runs_on();
    assert!(!pair.set().exists(), "{ended:#?}");
    // It cannot be asked to clear up either.
    let running = Running::start(pair.park(pid, Some("shown")));
    let keeper = agent(&pair.keeper);
    assert!(eventually(WITHIN, || is_stopped(keeper)));
    wall(&pair.keeper, &pair.host);
    kill(driver(&pair.host), Signal::SIGINT).unwrap();
    let ended = running.finish();
    unwall(&pair.keeper);
    assert_eq!(ended.status.code(), Some(INTERRUPTED), "{ended:#?}");
    assert!(
        ended.text().contains("host2 may have something of tree"),
        "{ended:#?}"
    );
    runs_on();
    kill(keeper, Signal::SIGKILL).unwrap();
    let list = succeeds(&pair.keeper, &["resume", "--list", "--dir", KEPT]).stdout;
    assert!(list.contains("was not parked to the end"), "{list}");

    // Whoever parks dies: the keeper removes what it has, what the last one left as well.
    for moment in ["stub", "handover", "sealed"] {
        let mut command = pair.park(pid, None);
        command.env("MIGRATE_STOP_AT", moment);
        let running = Running::start(command);
        let driver = driver(&pair.host);
        assert!(eventually(WITHIN, || is_stopped(driver)), "{moment}");
        assert!(pair.stub().join("manifest.json").exists(), "{moment}");
        kill(driver, Signal::SIGKILL).unwrap();
        assert_eq!(running.finish().status.code(), None);
        runs_on();
        assert!(eventually(WITHIN, || !pair.set().exists()), "{moment}");
    }

    pair.parks(pid);
    // Another tree may not take its place.
    let other = Workload::start(Kind::ShellLoop, &scene.lab).unwrap();
    let other = other.pid.to_string();
    fs::rename(pair.stub(), pair.host.path(DIR).join("aside")).unwrap();
    let park = [
        "park", &other, "--dir", DIR, "--name", NAME, "--to", "host2",
    ];
    pair.run(&park)
        .expect(REFUSED, &["holds a parked tree already"]);
    fs::rename(pair.host.path(DIR).join("aside"), pair.stub()).unwrap();
    pair.resumes();
    serves_old_connections(&mut scene.client);
    // A kernel that does not end has its tree back from there, too.
    let maintain = [
        "maintenance",
        &id,
        "--dir",
        DIR,
        "--to",
        "host2",
        "--reboot-cmd",
        "exit 3",
    ];
    let ended = pair.run(&maintain);
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    assert!(ended.stdout.contains("runs again"), "{ended:#?}");
    serves_old_connections(&mut scene.client);
    no_gate_left(&pair.host);
    assert!(scene.client.stop().unwrap().is_clean());
}

/// An echo on the first host, how many resets its clients had before, these, and the pair.
fn echo_on(lab: &Lab) -> (Workload, u64, StrictClient, Pair) {
    let echo = Workload::start(Kind::Echo, lab).unwrap();
    let resets = reset_connections(&lab.host(HostName::Client)).unwrap();
    let mut client = echo.client(lab, 3, &PATIENT).unwrap();
    serves_old_connections(&mut client);
    let pair = Pair::prepare(lab.host(HostName::Host1), lab.host(HostName::Host2));
    (echo, resets, client, pair)
}

/// At the commit itself: one of the two has the tree, and the keeper's disk says who.
#[test]
fn whoever_fails_at_the_commit_leaves_one_tree() {
    require!("whoever_fails_at_the_commit_leaves_one_tree": root, tcx, criu, migrate);
    let lab = scoped("park-to-commit");
    let (echo, resets, mut client, pair) = echo_on(&lab);
    let (host, pid) = (&pair.host, echo.pid);
    let stopped_at = |moment| {
        let mut command = pair.park(pid, Some(moment));
        command.arg("--json");
        let running = Running::start(command);
        let keeper = agent(&pair.keeper);
        assert!(eventually(WITHIN, || is_stopped(keeper)), "{moment}");
        (running, keeper)
    };

    // `Go` has come, and the keeper dies before it has done anything about it.
    let (running, keeper) = stopped_at("go");
    kill(keeper, Signal::SIGKILL).unwrap();
    // Whoever answers the question must not stop.
    let ended = running.finish();
    assert_eq!(ended.status.code(), Some(ROLLED_BACK), "{ended:#?}");
    assert!(runs(host, pid) && !pair.stub().exists() && !pair.set().exists());
    serves_old_connections(&mut client);

    // It dies just after.
    let (running, keeper) = stopped_at("parked");
    kill(keeper, Signal::SIGKILL).unwrap();
    let ended = running.finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    pair.is_parked(pid);
    pair.resumes();
    serves_old_connections(&mut client);

    // The network is gone between `Go` and its answer for as long as that takes.
    let (mut running, keeper) = stopped_at("go");
    wall(&pair.keeper, host);
    kill(keeper, Signal::SIGCONT).unwrap();
    assert!(running.await_event(|event| event["event"] == "warning"));
    assert!(runs(host, pid), "it is kept until somebody knows");
    unwall(&pair.keeper);
    let ended = running.finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    pair.is_parked(pid);
    pair.resumes();
    serves_old_connections(&mut client);

    // And who has parked with it.
    let (running, keeper) = stopped_at("go");
    let driver = driver(host);
    wall(&pair.keeper, host);
    for dies in guards(host).into_iter().chain([driver]) {
        kill(dies, Signal::SIGKILL).unwrap();
    }
    assert_eq!(running.finish().status.code(), None);
    kill(keeper, Signal::SIGCONT).unwrap();
    assert!(eventually(WITHIN, || pair
        .set()
        .join("manifest.json")
        .exists()));
    // Nobody can say: the tree stands still, and does not come back either.
    let recover = pair.run(&["recover"]);
    recover.expect(UNDECIDED, &["kept here, fenced"]);
    assert!(runs(host, pid), "the tree is kept");
    pair.refuses(&["has not been settled", "migrate recover"]);
    unwall(&pair.keeper);
    let recover = pair.succeeds(&["recover"]);
    assert!(
        recover.stdout.contains("the frozen tree is gone"),
        "{recover:#?}"
    );
    pair.is_parked(pid);
    pair.resumes();
    serves_old_connections(&mut client);

    // The same before it has committed, and a boot before anybody asks: it is lost with the
    // machine, and nothing says that it waits.
    no_gate_left(host);
    clean_client(&lab, client, resets);
    let (running, keeper) = stopped_at("go");
    let driver = migrate_tests::refusals::driver(host);
    kill(keeper, Signal::SIGKILL).unwrap();
    let _stays = Held::stop(driver);
    shell(host, &format!("kill -9 {pid}"));
    for dies in guards(host).into_iter().chain([driver]) {
        kill(dies, Signal::SIGKILL).unwrap();
    }
    drop(running);
    shell(host, "migrate unlock --force; rm -rf /run/migrate/journal");
    let list = succeeds(host, &["resume", "--list", "--dir", DIR]).stdout;
    assert!(list.contains("may wait on host2"), "{list}");
    let guarded = succeeds(host, &["guard-boot", "--dir", DIR]).stdout;
    assert!(guarded.contains("tree: nothing answers for"), "{guarded}");
    pair.refuses(&["host2 was to keep the tree", "has not taken it"]);
    assert!(!pair.stub().exists() && !pair.set().exists());
    no_gate_left(host);
}

#[test]
fn what_is_kept_comes_back_once_and_as_it_was() {
    require!("what_is_kept_comes_back_once_and_as_it_was": root, tcx, criu, migrate);
    let lab = scoped("park-to-once");
    let (echo, resets, mut client, pair) = echo_on(&lab);
    let (host, pid) = (&pair.host, echo.pid);
    pair.parks(pid);
    let waits = || assert!(!runs(host, pid), "it waits");

    // Altered where it is kept, in every way; the digests are here.
    let set = pair.set();
    let pages = set.join("images/pages-1.img");
    let flip = |content: &mut Vec<u8>| {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    };
    with(&pages, flip, || {
        pair.refuses(&["pages-1.img", "its content has changed"]);
    });
    let cut = |content: &mut Vec<u8>| content.truncate(4096);
    with(&pages, cut, || {
        Running::start(pair.resume(None))
            .finish()
            .expect(REFUSED, &["pages-1.img"]);
    });
    let aside = set.join("aside");
    fs::rename(&pages, &aside).unwrap();
    Running::start(pair.resume(None))
        .finish()
        .expect(REFUSED, &["pages-1.img"]);
    fs::rename(&aside, &pages).unwrap();
    // A manifest that goes with it does not help.
    let manifest = set.join("manifest.json");
    with(&manifest, edit("pages-1.img", "pages-7.img"), || {
        fs::rename(&pages, set.join("images/pages-7.img")).unwrap();
        pair.refuses(&["pages-7.img", "it was not there"]);
        fs::rename(set.join("images/pages-7.img"), &pages).unwrap();
    });
    with(&manifest, edit("\"id\":\"park-", "\"id\":\"park-0"), || {
        pair.run(&["resume", "--dir", DIR])
            .expect(REFUSED, &["another tree"]);
    });
    // Another disk is mounted there, or none.
    fs::rename(pair.keeper.path(KEPT).join(".store"), set.join("aside")).unwrap();
    pair.run(&["resume", "--dir", DIR])
        .expect(REFUSED, &["is not the directory"]);
    fs::rename(set.join("aside"), pair.keeper.path(KEPT).join(".store")).unwrap();
    waits();

    // Who keeps it does not resume it.
    let kept = ["resume", "--dir", KEPT, "--name", NAME];
    run(&pair.keeper, &kept).expect(REFUSED, &["was given to host1"]);
    fs::rename(set.join("mark.json"), set.join("aside")).unwrap();
    with(&manifest, another_machine(&manifest), || {
        run(&pair.keeper, &kept).expect(REFUSED, &["parked on another machine, host1"]);
        // Nor does any other machine have it.
        pair.run(&["resume", "--dir", DIR])
            .expect(REFUSED, &["parked on another machine"]);
    });
    fs::rename(set.join("aside"), set.join("mark.json")).unwrap();

    // Two at once.
    let mut command = pair.resume(None);
    command.env("MIGRATE_STOP_AT", "resume-restored");
    let running = Running::start(command);
    let first = held(host, "resume");
    pair.refuses(&["another migrate is at work"]);
    // One that is killed has taken nothing with it.
    kill(first, Signal::SIGKILL).unwrap();
    assert_eq!(running.finish().status.code(), None);
    assert!(eventually(WITHIN, || guards(host).is_empty()));
    assert!(eventually(WITHIN, || !runs(host, pid)));

    // While the keeper gives it nobody else has it.
    let running = Running::start(pair.resume(Some("taken")));
    let giving = agent(&pair.keeper);
    assert!(eventually(WITHIN, || is_stopped(giving)));
    run(&pair.keeper, &kept).expect(REFUSED, &["another migrate is at work"]);
    kill(giving, Signal::SIGKILL).unwrap();
    let ended = running.finish();
    assert_ne!(ended.status.code(), Some(0), "{ended:#?}");
    assert_eq!(image_mounts(host), Vec::<String>::new());
    // What one has fetched that is killed goes with the next.
    let running = Running::start(pair.resume(Some("taken")));
    let giving = agent(&pair.keeper);
    assert!(eventually(WITHIN, || is_stopped(giving)));
    assert!(eventually(WITHIN, || !image_mounts(host).is_empty()));
    kill(runner(host, "resume"), Signal::SIGKILL).unwrap();
    assert_eq!(running.finish().status.code(), None);
    kill(giving, Signal::SIGCONT).unwrap();
    assert!(eventually(WITHIN, || is_over(giving)));
    waits();
    let guard = succeeds(host, &["guard-boot", "--dir", DIR]).stdout;
    assert!(guard.contains("as before"), "{guard}");

    pair.resumes();
    serves_old_connections(&mut client);
    assert!(runs(host, pid) && !set.exists());
    assert_eq!(image_mounts(host), Vec::<String>::new());
    pair.refuses(&["were removed when the tree was resumed"]);
    no_gate_left(host);
    clean_client(&lab, client, resets);
}

#[test]
fn a_standing_agent_keeps_a_tree() {
    require!("a_standing_agent_keeps_a_tree": root, tcx, criu, migrate);
    let mut scene = Scene::start("park-to-standing", Kind::Echo, 3);
    let pair = Pair::of(&scene);
    standing::certify(&scene.lab, &[HostName::Host1, HostName::Host2]);
    let _agent = standing::start_with(&pair.keeper, &["--policy", POLICY_FILE]);
    let pid = scene.workload.pid.to_string();
    let mut park = vec!["park", &pid, "--dir", DIR, "--name", NAME];
    let words = standing::words(HostName::Host1, HostName::Host2);
    park.extend(words.iter().map(String::as_str));
    succeeds(&pair.host, &park);
    pair.is_parked(scene.workload.pid);
    succeeds(&pair.host, &["resume", "--dir", DIR]);
    serves_old_connections(&mut scene.client);
    assert!(!pair.set().exists());
    no_gate_left(&pair.host);
    assert!(scene.client.stop().unwrap().is_clean());
}

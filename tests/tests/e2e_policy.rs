//! An agent restores what its host's policy allows, and says what it does not.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::process::Command;

use migrate_tests::refusals::{CONNECT, POLICY_FILE, REFUSED, Running, Scene, under_policy};
use migrate_tests::require;
use migrate_tests::workload::Kind;

/// A migration to an agent with this policy.
fn with_policy(scene: &Scene, policy: &str) -> Command {
    let mut command = scene.to_destination(&[]);
    under_policy(&mut command, &scene.destination(), policy);
    command
}

#[test]
fn what_the_policy_does_not_allow_is_refused() {
    require!("what_the_policy_does_not_allow_is_refused": root, tcx, criu, migrate);
    let mut scene = Scene::start("policy", Kind::Echo, 3);
    for (policy, words) in [
        ("users = [4711]", "does not allow user 0"),
        (
            "addresses = ['10.78.0.0/16', 'fd00::/8']",
            "does not allow this address",
        ),
        ("memory_mib_max = 0", "MiB of memory, only 0 MiB"),
    ] {
        let command = with_policy(&scene, policy);
        scene.fails(command, REFUSED, &[words, "policy"]);
    }
    // A rule that is not understood is not taken for none.
    let command = with_policy(&scene, "user = [0]");
    scene.fails(command, CONNECT, &["could not use the policy", POLICY_FILE]);

    let command = with_policy(&scene, "build_ids = ['c0ffee']");
    let refused = scene.fails(
        command,
        REFUSED,
        &["does not allow a program with the build-id"],
    );
    let text = refused.text();
    let (_, after) = text.split_once("build-id ").unwrap();
    let build_id: String = after.chars().take_while(char::is_ascii_hexdigit).collect();

    let allowed = format!(
        "users = [0]\naddresses = ['10.77.0.0/16']\nmemory_mib_max = 4096\nbuild_ids = ['{build_id}']\n"
    );
    let ended = Running::start(with_policy(&scene, &allowed)).finish();
    assert_eq!(ended.status.code(), Some(0), "{ended:#?}");
    scene.has_moved();
    scene.unharmed();
}

//! An OpenVPN over TCP, from the client to the workload's address, and a server behind it that the
//! client reaches through the tunnel alone.
//!
//! ```text
//!   client ── tun0 10.8.0.2 ═══ TCP ═══ tun0 10.8.0.1 ── host1 ── eth0 ── host2 192.0.2.1
//! ```
//!
//! The device of the server's host is the host's own and made by it at each boot.

use migrate_test_hosts::{HostName, WORKLOAD_V4};

/// Both ends have it, made by `openvpn --genkey secret`.
pub const KEY: &str = "/srv/vpn.key";
/// Where the server listens.
pub const PORT: u16 = 1194;
/// The server behind the tunnel.
pub const BEHIND: &str = "192.0.2.1";
/// The client's end of the tunnel.
pub const CLIENT: &str = "10.8.0.2";
/// On the client, once the tunnel is up.
pub const ROUTE: &str = "ip route add 192.0.2.1 dev tun0 src 10.8.0.2";

/// What makes the server's device, in a shell.
pub const DEVICE: &str = "ip tuntap add dev tun0 mode tun && \
     ip address add 10.8.0.1 peer 10.8.0.2 dev tun0 && ip link set tun0 up";

/// The server's host as a router, in a shell.
#[must_use]
pub fn router() -> String {
    let behind = HostName::Host2.ipv4();
    format!("sysctl -qw net.ipv4.ip_forward=1 && ip route replace {BEHIND} via {behind}")
}

/// The host with the server behind it, in a shell.
#[must_use]
pub fn behind() -> String {
    let router = HostName::Host1.ipv4();
    format!("ip address add {BEHIND}/32 dev lo && ip route add {CLIENT} via {router}")
}

/// The server.
#[must_use]
pub fn server() -> Vec<String> {
    let local = WORKLOAD_V4.to_string();
    let own = [
        "--proto",
        "tcp-server",
        "--local",
        &local,
        "--ifconfig-noexec",
    ];
    openvpn("tun0", PORT, &own)
}

/// The client.
#[must_use]
pub fn client() -> Vec<String> {
    let remote = WORKLOAD_V4.to_string();
    let own = ["--proto", "tcp-client", "--nobind", "--remote", &remote];
    openvpn(
        "tun0",
        PORT,
        &[&own[..], &["--ifconfig", CLIENT, "10.8.0.1"]].concat(),
    )
}

/// An `openvpn` at a device of any name.
#[must_use]
pub fn openvpn(device: &str, port: u16, more: &[&str]) -> Vec<String> {
    let port = port.to_string();
    let device = [
        "openvpn",
        "--dev",
        device,
        "--dev-type",
        "tun",
        "--port",
        &port,
    ];
    let rest = [
        "--secret",
        KEY,
        "--cipher",
        "AES-256-CBC",
        "--log",
        "/dev/null",
    ];
    let words = device.iter().chain(more).chain(&rest);
    words.map(|word| (*word).to_owned()).collect()
}

//! Test hosts made of namespaces: two machines and a client on one kernel.

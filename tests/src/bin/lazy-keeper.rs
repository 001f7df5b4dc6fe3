//! The memory keeper alone, for tests without an agent.

fn main() {
    if let Err(error) = migrate_memory::keep() {
        // The one who has started it hears the same.
        eprintln!("lazy-keeper: {error}");
        std::process::exit(1);
    }
}

//! The memory keeper alone, for tests without an agent.
//!
//! `lazy-keeper [MOMENT]`: with `last-word` or the number of an event it ends there as
//! `kill -9` would end it.

use migrate_memory::Death;

fn main() {
    let death = std::env::args().nth(1).map(|moment| match moment.parse() {
        Ok(number) => Death::AtEvent(number),
        Err(_) => Death::AtLastWord,
    });
    if let Err(error) = migrate_memory::keep_until(death) {
        // The one who has started it hears the same.
        eprintln!("lazy-keeper: {error}");
        std::process::exit(1);
    }
}

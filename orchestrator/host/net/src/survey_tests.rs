//! The rules of a survey, on made-up hosts.

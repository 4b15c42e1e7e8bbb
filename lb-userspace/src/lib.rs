//! Lobby's control plane: from one document to the tables that the XDP program reads.
//!
//! Data flows one way. [`config`] turns a document into a checked [`model`]; [`health`] says which
//! backends are usable; [`plan`] turns both, with [`maglev`] rings, into ordered operations on a
//! [`dataplane`]. These floors are pure: time, seed and randomness are arguments.

#![deny(unsafe_code)]

pub mod addresses;
pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod doctor;
pub mod health;
pub mod log;
pub mod maglev;
pub mod metrics;
pub mod model;
pub mod netlink;
pub mod packet;
pub mod plan;
pub mod probe;
pub mod proxy;

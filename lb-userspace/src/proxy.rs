//! The reception desk: Lobby's own L7 proxy, a process of its own without rights.
//!
//! ```text
//!            daemon ── orders, sockets ──► desk ── reports ──► daemon
//!  client ─► XDP: firewall, then up ─► kernel's TCP ─► [`engine`] ─► [`request`] ─► [`route`] ─► [`auth`] ─► [`pools`] ─► backend
//! ```
//!
//! What decides is pure and knows nothing of sockets: [`chain`], [`path`], [`request`], [`route`], [`auth`], [`limits`], [`headers`],
//! [`pools`], [`transport`], [`voice`], [`page`]. [`engine`] alone knows of hyper. [`desk`] is the process, [`orders`] what it and the daemon say to
//! each other, [`confine`] how it gives up its rights.

pub mod access;
pub mod auth;
pub mod chain;
pub mod chance;
pub mod confine;
pub mod desk;
pub mod engine;
pub mod figures;
pub mod headers;
pub mod limits;
pub mod orders;
pub mod page;
pub mod path;
pub mod pools;
pub mod request;
pub mod route;
pub mod state;
pub mod tls;
pub mod transport;
pub mod voice;
pub mod worker;

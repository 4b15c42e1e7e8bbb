//! What the tests share: packets built and checked by an independent library ([`packets`]), tables with
//! one of everything ([`world`]) for the program and the host side by side ([`both`]), Lobby at work in a lab ([`stage`]) with documents for it ([`document`])
//! and clients that stay long ([`download`]) or are in a [`vlan`], clients that speak HTTP byte by byte ([`requests`]), random numbers that can be had again
//! ([`random`]), and connections played through changes of their backends ([`simulation`]).

pub mod both;
pub mod document;
pub mod download;
pub mod packets;
pub mod random;
pub mod requests;
pub mod simulation;
pub mod stage;
pub mod vlan;
pub mod world;

//! What the tests share: packets built and checked by an independent library ([`packets`]), tables with
//! one of everything ([`world`]) for the program and the host side by side ([`both`]), Lobby at work in a lab ([`stage`]) with documents for it ([`document`])
//! and clients that stay long ([`download`]) or say nothing ([`silent`]), are many ([`crowd`], with servers that say who they are: [`echo`]), send
//! a [`flood`], ask a database cluster ([`accounts`]), are in a [`vlan`] or speak HTTP byte by byte ([`requests`]) and frame by frame ([`frames`]), a server of HTTP/2 ([`multiplex`]), the reception [`desk`] by itself, an [`authority`] of certificates, [`tokens`], random
//! numbers that can be had again ([`random`]), and connections played through changes of their backends
//! ([`simulation`]), and a second CPU that comes between ([`meeting`]). What
//! must hold for any bytes is in [`fuzz`].

pub mod accounts;
pub mod authority;
pub mod both;
pub mod crowd;
pub mod desk;
pub mod document;
pub mod download;
pub mod echo;
pub mod flood;
pub mod frames;
pub mod fuzz;
pub mod meeting;
pub mod multiplex;
pub mod packets;
pub mod random;
pub mod requests;
pub mod silent;
pub mod simulation;
pub mod stage;
pub mod tap;
pub mod tokens;
pub mod vector;
pub mod vlan;
pub mod world;

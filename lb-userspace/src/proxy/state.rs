//! What the desk serves now: orders turned into what a request is looked up in.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use http::HeaderName;
use rustls::ServerConfig;
use tracing::error;

use super::{
    auth::{Caller, Gate, Messenger, Passport, Porter},
    limits::{Limits, Visitor},
    orders::{Orders, ServiceOrder},
    page::Pages,
    pools::Pools,
    route::Table,
    tls::{self, ClientRules},
    voice::Trouble,
};
use crate::model::{
    Network,
    desk::{Action, Route},
    guard::Way,
};

/// What is served.
#[derive(Default)]
pub struct State {
    /// By where it listens.
    services: HashMap<SocketAddr, Arc<Service>>,
    /// The number of its orders.
    pub number: u64,
    /// The pools.
    pub pools: Pools,
}

/// What a route is called in figures and logs.
#[derive(Clone, Debug, Default)]
pub struct Called {
    /// Its condition, as written; empty: no route.
    pub route: Arc<str>,
    /// The pool that it leads to; empty: the desk answers by itself.
    pub pool: Arc<str>,
}

impl Called {
    fn of(route: &Route) -> Self {
        let pool = match &route.action {
            Action::Forward { pool, .. } => pool.as_str(),
            Action::Redirect { .. } | Action::Respond { .. } => "",
        };
        Self { route: route.condition.to_string().into(), pool: pool.into() }
    }
}

/// A service.
pub struct Service {
    /// As ordered.
    pub order: ServiceOrder,
    /// Its routes.
    pub table: Table,
    /// What each route is called, by its number.
    names: Vec<Called>,
    /// What each asks of who comes by it.
    gates: Vec<Gate>,
    /// How often requests may come by each.
    limits: Vec<Limits>,
    /// What browsers are shown where something is wrong.
    pub pages: Pages,
    /// Headers that tell who asks, on whatever route of whatever service: from outside they could say anything.
    telling: Arc<[HeaderName]>,
    /// What clients may show to it.
    pub clients: Option<Arc<ClientRules>>,
    /// What it shows to its clients; `None`: plain HTTP.
    pub tls: Option<Arc<ServerConfig>>,
}

impl State {
    /// As ordered, with what stays of the state before: counts, and sessions of TLS.
    pub fn ordered(orders: &Orders, before: &Self) -> Self {
        let guards =
            || orders.services.iter().flat_map(|service| &service.desk.routes).map(|route| &route.guard);
        let asked = guards().flat_map(|guard| &guard.ways).flat_map(Way::told_in);
        let telling: BTreeSet<&String> =
            guards().flat_map(|guard| guard.identity.keys()).chain(asked).collect();
        let telling = telling.into_iter().filter_map(|name| HeaderName::try_from(name).ok());
        let telling: Arc<[HeaderName]> = telling.collect();
        let service = |order: &ServiceOrder| {
            let before = before.services.get(&order.listen);
            let clients = order.desk.clients.as_ref().map(|clients| ClientRules {
                // Without them nobody is believed, and the service is not served.
                authorities: orders.files.get(&clients.ca).cloned().unwrap_or_default(),
                revoked: clients.crl.as_ref().map(|crl| orders.files.get(crl).cloned().unwrap_or_default()),
                required: clients.required,
            });
            let same_clients = before.filter(|before| before.clients.as_deref() == clients.as_ref());
            let clients = match same_clients {
                Some(before) => before.clients.clone(),
                None => clients.map(Arc::new),
            };
            let known = same_clients.filter(|before| before.order.certificates == order.certificates);
            let tls = match known {
                Some(known) => known.tls.clone(),
                None => match tls::server(&order.certificates, clients.as_deref()) {
                    Ok(tls) => tls,
                    Err(why) => {
                        // The daemon has tried them; if one is unfit all the same, nothing goes in clear text.
                        error!(service = order.name, "its certificates cannot be used: {why}");
                        same_clients.and_then(|before| before.tls.clone())
                    }
                },
            };
            if tls.is_none() && !order.certificates.is_empty() {
                return None;
            }
            let table = Table::new(&order.desk.routes);
            let names = order.desk.routes.iter().map(Called::of).collect();
            let pages = Pages::new(&order.desk.pages, &orders.files);
            let gates =
                order.desk.routes.iter().map(|route| Gate::new(&route.guard, &orders.files)).collect();
            let limits = |route: &Route| {
                let same = |before: &&Arc<Service>| {
                    let place =
                        before.order.desk.routes.iter().position(|it| it.condition == route.condition);
                    place.and_then(|place| before.limits.get(place)).cloned()
                };
                Limits::new(&route.limits, before.as_ref().and_then(same).as_ref())
            };
            let limits = order.desk.routes.iter().map(limits).collect();
            let telling = Arc::clone(&telling);
            let order = order.clone();
            let service = Service { order, table, names, gates, limits, pages, telling, clients, tls };
            Some((service.order.listen, Arc::new(service)))
        };
        Self {
            services: orders.services.iter().filter_map(service).collect(),
            number: orders.number,
            pools: Pools::ordered(&orders.pools, &orders.files, &before.pools),
        }
    }

    /// The service that listens there.
    pub fn service(&self, listen: SocketAddr) -> Option<Arc<Service>> {
        self.services.get(&listen).cloned()
    }

    /// Where services listen.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.services.keys().copied()
    }
}

impl Service {
    /// Whether somebody may come in by a route, and as whom.
    ///
    /// # Errors
    /// Why not.
    pub async fn admit(
        &self,
        route: usize,
        caller: &Caller<'_>,
        porter: &Porter,
        messenger: &impl Messenger,
    ) -> Result<Passport, Trouble> {
        // Each route has its gate; without one nobody would come in.
        let (gate, limits) = self.gates.get(route).zip(self.limits.get(route)).ok_or(Trouble::Closed)?;
        // Who may not come in takes nothing from those who may.
        gate.lets_in(caller.source).map_err(Trouble::Refused)?;
        let visitor = Visitor { source: caller.source, headers: caller.headers, user: None };
        limits.take(&visitor, Instant::now()).map_err(Trouble::TooOften)?;
        let mut passport = gate.admit(caller, porter, messenger).await.map_err(Trouble::Refused)?;
        if let Some(user) = &passport.user {
            let known = Visitor { user: Some(user), ..visitor };
            limits.take(&known, Instant::now()).map_err(Trouble::TooOften)?;
        }
        passport.withheld.extend_from_slice(&self.telling);
        Ok(passport)
    }

    /// What a route is called.
    pub fn name_of(&self, route: usize) -> Called {
        self.names.get(route).cloned().unwrap_or_default()
    }

    /// Headers by which the desk alone tells who asks.
    pub fn telling(&self) -> &[HeaderName] {
        &self.telling
    }

    /// Whether somebody is a proxy that is believed.
    pub fn is_proxy(&self, peer: IpAddr) -> bool {
        Network::any(&self.order.desk.proxies, peer)
    }

    /// Whether a client may come in: the longest prefix decides, as in the packet path, which has looked at
    /// those that come by a listed interface; others come here only.
    pub fn admits(&self, client: IpAddr) -> bool {
        Network::admits(&self.order.allow, &self.order.deny, client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::desk::Desk;

    #[test]
    fn the_longest_prefix_decides() {
        let networks = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let service = |allow: &[&str], deny: &[&str]| Service {
            order: ServiceOrder {
                name: "s".into(),
                listen: "203.0.113.10:80".parse().unwrap(),
                allow: networks(allow),
                deny: networks(deny),
                certificates: Vec::new(),
                desk: Desk::default(),
            },
            table: Table::new(&[]),
            names: Vec::new(),
            gates: Vec::new(),
            limits: Vec::new(),
            pages: Pages::default(),
            telling: Arc::new([]),
            clients: None,
            tls: None,
        };
        for (allow, deny, client, admitted) in [
            (&[][..], &[][..], "10.1.2.3", true),
            (&["10.0.0.0/8"], &[], "10.1.2.3", true),
            (&["10.0.0.0/8"], &[], "::ffff:10.1.2.3", true),
            (&["10.0.0.0/8"], &[], "11.1.2.3", false),
            (&["10.0.0.0/8"], &[], "2001:db8::1", false),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], "10.1.2.3", false),
            (&["10.0.0.0/8"], &["10.1.0.0/16"], "10.2.2.3", true),
            (&["10.1.2.0/24"], &["10.1.0.0/16"], "10.1.2.3", true),
            (&[], &["10.1.0.0/16"], "10.1.2.3", false),
            (&[], &["10.1.0.0/16"], "10.2.2.3", true),
            (&[], &["::/0"], "2001:db8::1", false),
            (&["2001:db8::/32"], &["::/0"], "2001:db8::1", true),
        ] {
            assert_eq!(
                service(allow, deny).admits(client.parse().unwrap()),
                admitted,
                "{allow:?} {deny:?} {client}"
            );
        }
    }
}

//! Routes of the desk as operators ask for them: all of them, and which one a request would take, by the
//! same rules that the desk serves by.

use std::net::IpAddr;

use http::{HeaderName, HeaderValue, Request, Uri};

use crate::{
    api::view,
    model::{Config, Service, desk::Desk},
    proxy::{
        request::target,
        route::{Asked, Found, Table, host_name, miss, sent},
        voice::Trouble,
    },
};

/// All routes, by service, the narrowest first. `usable` says how many backends of a pool get requests,
/// `answers` how many a route of a service has given.
pub fn list(
    config: &Config,
    usable: impl Fn(&str) -> usize,
    answers: impl Fn(&str, &str) -> u64,
) -> Vec<view::Route> {
    let of_service = |(name, service, desk): (&String, &Service, &Desk)| {
        let view = |(_, route): (usize, &crate::model::desk::Route)| {
            let condition = route.condition.to_string();
            view::Route {
                service: name.clone(),
                listen: service.listen.to_string(),
                tls: !desk.certificates.is_empty(),
                asks: route.asks(),
                action: route.action.to_string(),
                usable: route.pool().map(&usable),
                answers: answers(name, &condition),
                route: condition,
            }
        };
        Table::new(&desk.routes).routes().map(view).collect::<Vec<_>>()
    };
    config.at_desk().flat_map(of_service).collect()
}

/// Which way a request would go, at each service that it could be for.
///
/// # Errors
/// When it is no request, or no service could be meant; in words.
pub fn explain(
    config: &Config,
    question: &view::RouteQuestion,
) -> Result<Vec<view::RouteExplanation>, String> {
    let wrong = || {
        format!("\"{}\" is no address of a request; write one such as https://shop.example/pay", question.url)
    };
    let uri: Uri = question.url.parse().map_err(|_| wrong())?;
    let (tls, standard) = match uri.scheme_str() {
        Some("https") => (true, 443),
        Some("http") => (false, 80),
        _ => return Err(wrong()),
    };
    let authority = uri.authority().map(http::uri::Authority::as_str).filter(|it| host_name(it).is_some());
    let authority = authority.ok_or_else(wrong)?;
    let port = uri.port_u16().unwrap_or(standard);
    let address: Option<IpAddr> = uri.host().and_then(|host| host.trim_matches(['[', ']']).parse().ok());
    let meant = |(_, service, desk): &(&String, &Service, &Desk)| {
        service.listen.port == Some(port)
            && desk.certificates.is_empty() != tls
            && address.is_none_or(|address| address == service.listen.address)
    };
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let mut request = Request::builder().method(question.method.as_str()).uri(path).header("host", authority);
    for (name, value) in &question.headers {
        let header = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok());
        let (name, value) = header.ok_or_else(|| format!("\"{name}: {value}\" is no header"))?;
        request = request.header(name, value);
    }
    let request = request.body(()).map_err(|error| format!("that is no request: {error}"))?;
    let (parts, ()) = request.into_parts();
    let found: Vec<_> = config
        .at_desk()
        .filter(meant)
        .map(|(name, service, desk)| at_service(name, service, desk, &parts))
        .collect();
    if found.is_empty() {
        let kind = if tls { "with TLS" } else { "without TLS" };
        return Err(format!("no service of the desk listens on port {port} {kind}; see `lb route list`"));
    }
    Ok(found)
}

fn at_service(
    name: &str,
    service: &Service,
    desk: &Desk,
    parts: &http::request::Parts,
) -> view::RouteExplanation {
    let mut explanation = view::RouteExplanation {
        service: name.to_owned(),
        listen: service.listen.to_string(),
        host: None,
        path: None,
        outcome: String::new(),
        asks: String::new(),
        sent: None,
        routes: Vec::new(),
    };
    let refused = |trouble: &Trouble| {
        let words = trouble.words();
        format!("answered with {} by the desk: {}", words.status, words.text)
    };
    let target = match target(parts) {
        Ok(target) => target,
        Err(trouble) => {
            explanation.outcome = refused(&trouble);
            return explanation;
        }
    };
    let asked = Asked {
        host: &target.host,
        path: &target.path,
        method: parts.method.as_str(),
        headers: &parts.headers,
    };
    let table = Table::new(&desk.routes);
    let found = table.find(&asked);
    let taken = match &found {
        Found::Route(number, _) => Some(*number),
        _ => None,
    };
    let consider = |(number, route): (usize, &crate::model::desk::Route)| view::Considered {
        route: route.condition.to_string(),
        action: route.action.to_string(),
        verdict: match miss(&route.condition, &asked) {
            _ if Some(number) == taken => "taken".to_owned(),
            None => "met, but a narrower one is taken".to_owned(),
            Some(miss) => miss.to_string(),
        },
    };
    explanation.routes = table.routes().map(consider).collect();
    explanation.outcome = match &found {
        Found::Route(_, route) => {
            explanation.asks = route.asks();
            if route.pool().is_some() {
                explanation.sent = Some(sent(route, &target.path).into_owned());
            }
            route.action.to_string()
        }
        Found::OtherMethod(methods) => {
            let methods: Vec<&str> = methods.iter().copied().collect();
            refused(&Trouble::Method(methods.join(", ")))
        }
        Found::NoPath => refused(&Trouble::NoPath),
        Found::NoHost => refused(&Trouble::NoHost),
    };
    explanation.host = Some(target.host);
    explanation.path = Some(target.path);
    explanation
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Document;

    const DOCUMENT: &str = r#"interfaces = ["eth0"]
[pools.web]
backends = []
[services.front]
listen = "203.0.113.10:443/tcp"
tls = { cert = "a", key = "b" }
pool = "web"
[[services.front.routes]]
host = "shop.example"
path = "/pay"
method = "POST"
auth = { basic = { users = "staff" } }
require = { role = ["admin", "staff"] }
allow = ["10.0.0.0/8"]
pool = "web"
strip_prefix = true
[[services.front.routes]]
host = "shop.example"
path = "/pay"
header = { x-beta = "1" }
respond = 404
[services.plain]
listen = "203.0.113.10:80/tcp"
routes = [{ redirect = "https" }]
"#;

    fn explained(
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
    ) -> Result<view::RouteExplanation, String> {
        let config = Document::parse(DOCUMENT).unwrap().config;
        let headers = headers.iter().map(|&(name, value)| (name.into(), value.into())).collect();
        let question = view::RouteQuestion { url: url.into(), method: method.into(), headers };
        explain(&config, &question).map(|mut found| found.remove(0))
    }

    #[test]
    fn the_way_and_its_reasons_are_told() {
        let found = explained("POST", "https://Shop.example/a/../pay/%6eow?x", &[]).unwrap();
        assert_eq!((found.service.as_str(), found.outcome.as_str()), ("front", "pool web"));
        assert_eq!(found.host.as_deref(), Some("shop.example"));
        assert_eq!((found.path.as_deref(), found.sent.as_deref()), (Some("/pay/now"), Some("/now")));
        assert_eq!(found.asks, "basic, role admin or staff, from 10.0.0.0/8");
        let verdicts: Vec<_> =
            found.routes.iter().map(|it| (it.route.as_str(), it.verdict.as_str())).collect();
        assert_eq!(
            verdicts,
            [
                ("POST shop.example/pay/*", "taken"),
                ("shop.example/pay/* x-beta: 1", "header x-beta differs"),
                ("*/*", "met, but a narrower one is taken"),
            ]
        );
        let found = explained("GET", "https://shop.example/pay", &[("X-Beta", "1")]).unwrap();
        assert_eq!(
            (found.outcome.as_str(), found.routes[0].verdict.as_str()),
            ("respond 404", "another method")
        );
        let found = explained("GET", "http://203.0.113.10/x", &[]).unwrap();
        assert_eq!((found.service.as_str(), found.outcome.as_str()), ("plain", "redirect 308 to https"));
        let found = explained("GET", "https://shop.example/..%2fpay", &[]).unwrap();
        assert!(found.outcome.starts_with("answered with 400") && found.routes.is_empty(), "{found:?}");
    }

    #[test]
    fn what_is_no_question_is_refused_in_words() {
        let why = |method: &str, url: &str| explained(method, url, &[]).unwrap_err();
        assert!(why("GET", "shop.example/pay").contains("write one such as"));
        assert!(why("GET", "ftp://shop.example/").contains("write one such as"));
        assert!(why("GET", "https://shop.example:8443/").contains("port 8443 with TLS"));
        assert!(why("GET", "https://203.0.113.11/").contains("port 443 with TLS"));
        assert!(why("G T", "https://shop.example/").contains("no request"));
    }

    #[test]
    fn routes_are_listed_with_what_they_have_done() {
        let config = Document::parse(DOCUMENT).unwrap().config;
        let listed = list(&config, |_| 2, |service, route| (service.len() + route.len()) as u64);
        let shown: Vec<_> =
            listed.iter().map(|it| (it.service.as_str(), it.route.as_str(), it.usable)).collect();
        assert_eq!(
            shown,
            [
                ("front", "POST shop.example/pay/*", Some(2)),
                ("front", "shop.example/pay/* x-beta: 1", None),
                ("front", "*/*", Some(2)),
                ("plain", "*/*", None),
            ]
        );
        assert!(listed[0].tls && !listed[3].tls);
        assert_eq!((listed[0].asks.is_empty(), listed[1].asks.as_str()), (false, ""));
        assert_eq!(listed[2].answers, 8);
    }
}

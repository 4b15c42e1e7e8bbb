//! Edits by example: the whole text before and after, and by chance.

use proptest::prelude::*;

use super::*;

const TEXT: &str = r#"# The shop.
interfaces = ["eth0"]   # one leg

[pools.web] # page servers
health = { tcp = true }
backends = [
  # Rack 1
  { address = "10.0.0.11:8080" }, # old
  { address = "10.0.0.12:8080", weight = 2 }, # new
]

[[pools.mail.backends]]
address = "10.0.0.21:25"   # Hamburg
[[pools.mail.backends]]
address = "10.0.0.22:25"

[services.shop]
listen = "203.0.113.10:80/tcp"
pool = "web"   # not mail

[services.mail]
listen = "203.0.113.10:25/tcp"
pool = "mail"
"#;

fn address(text: &str) -> BackendAddress {
    text.parse().unwrap()
}

/// The lines that an edit takes away, with `-`, and those that it adds, with `+`.
fn difference(after: Result<String, EditError>) -> Vec<String> {
    let after = after.unwrap_or_else(|why| panic!("{why}"));
    let (mut old, mut new): (Vec<&str>, Vec<&str>) = (TEXT.lines().collect(), after.lines().collect());
    while !old.is_empty() && !new.is_empty() && old[0] == new[0] {
        (old, new) = (old.split_off(1), new.split_off(1));
    }
    while !old.is_empty() && old.last() == new.last() {
        old.pop();
        new.pop();
    }
    old.iter().map(|line| format!("-{line}")).chain(new.iter().map(|line| format!("+{line}"))).collect()
}

#[test]
fn a_backend_is_added_in_the_style_of_its_list() {
    let added = difference(add_backend(TEXT, "web", address("10.0.0.13:8080"), Some(3)));
    assert_eq!(added, [r#"+  { address = "10.0.0.13:8080", weight = 3 },"#]);
    let added = difference(add_backend(TEXT, "mail", address("10.0.0.23:25"), None));
    assert_eq!(added, ["+[[pools.mail.backends]]", r#"+address = "10.0.0.23:25""#, "+"]);
    let line = TEXT.replace(
        "backends = [\n  # Rack 1\n  { address = \"10.0.0.11:8080\" }, # old\n  { address = \"10.0.0.12:8080\", weight = 2 }, # new\n]",
        r#"backends = [ { address = "10.0.0.11:8080" } ]"#,
    );
    let after = add_backend(&line, "web", address("10.0.0.12:8080"), None).unwrap();
    assert!(
        after.contains(r#"backends = [ { address = "10.0.0.11:8080" }, { address = "10.0.0.12:8080" } ]"#),
        "{after}"
    );
    let without_comma = TEXT.replace("weight = 2 }, # new", "weight = 2 } # new");
    let after = add_backend(&without_comma, "web", address("10.0.0.13:8080"), None).unwrap();
    assert!(after.contains("weight = 2 }, # new\n  { address = \"10.0.0.13:8080\" },\n]"), "{after}");
}

#[test]
fn a_backend_goes_with_its_line_and_other_comments_stay() {
    let removed = difference(remove_backend(TEXT, "web", address("10.0.0.11:8080")));
    assert_eq!(removed, [r#"-  { address = "10.0.0.11:8080" }, # old"#]);
    let removed = difference(remove_backend(TEXT, "web", address("10.0.0.12:8080")));
    assert_eq!(removed, [r#"-  { address = "10.0.0.12:8080", weight = 2 }, # new"#]);
    let removed = difference(remove_backend(TEXT, "mail", address("10.0.0.21:25")));
    assert_eq!(removed, [r#"-address = "10.0.0.21:25"   # Hamburg"#, "-[[pools.mail.backends]]"]);
    let one = remove_backend(TEXT, "mail", address("10.0.0.21:25")).unwrap();
    let none = remove_backend(&one, "mail", address("10.0.0.22:25")).unwrap();
    assert!(Document::parse(&none).unwrap().config.pools["mail"].backends.is_empty());
    // The last of a list leaves a list that can be added to again.
    let one = remove_backend(TEXT, "web", address("10.0.0.11:8080")).unwrap();
    let none = remove_backend(&one, "web", address("10.0.0.12:8080")).unwrap();
    let again = add_backend(&none, "web", address("10.0.0.14:8080"), None).unwrap();
    assert!(again.contains("  # Rack 1\n  { address = \"10.0.0.14:8080\" },\n]"), "{again}");
}

#[test]
fn a_backend_is_drained_resumed_disabled_and_weighed() {
    let (old, new) = (address("10.0.0.11:8080"), address("10.0.0.21:25"));
    let line = r#"-  { address = "10.0.0.11:8080" }, # old"#;
    let drain = |deadline| Admin::Drain { deadline };
    let drained = set_admin(TEXT, "web", old, drain(None));
    assert_eq!(
        difference(drained.clone()),
        [line, r#"+  { address = "10.0.0.11:8080", drain = true }, # old"#]
    );
    let timed = set_admin(&drained.unwrap(), "web", old, drain(Some(1_796_061_600)));
    assert_eq!(
        difference(timed.clone()),
        [line, r#"+  { address = "10.0.0.11:8080", drain = 2026-11-30T18:00:00Z }, # old"#]
    );
    let disabled = set_admin(&timed.unwrap(), "web", old, Admin::Disabled);
    assert_eq!(
        difference(disabled.clone()),
        [line, r#"+  { address = "10.0.0.11:8080", disabled = true }, # old"#]
    );
    let resumed = set_admin(&disabled.unwrap(), "web", old, Admin::Enabled);
    assert_eq!(difference(resumed), [] as [&str; 0]);
    assert_eq!(difference(set_admin(TEXT, "mail", new, Admin::Disabled)), ["+disabled = true"]);
    let weighed = difference(set_weight(TEXT, "web", address("10.0.0.12:8080"), 5));
    assert_eq!(
        weighed,
        [
            r#"-  { address = "10.0.0.12:8080", weight = 2 }, # new"#,
            r#"+  { address = "10.0.0.12:8080", weight = 5 }, # new"#
        ]
    );
}

#[test]
fn services_and_pools_come_and_go() {
    let service = NewService {
        listen: "203.0.113.10:443/tcp".to_owned(),
        pool: "web".to_owned(),
        scheduler: Some("round-robin".to_owned()),
        allow: vec!["10.0.0.0/8".to_owned()],
        deny: vec![],
    };
    let with = add_service(TEXT, "front", &service);
    assert_eq!(
        difference(with.clone()),
        [
            "+",
            "+[services.front]",
            r#"+listen = "203.0.113.10:443/tcp""#,
            r#"+pool = "web""#,
            r#"+scheduler = "round-robin""#,
            r#"+allow = ["10.0.0.0/8"]"#
        ]
    );
    assert_eq!(difference(remove_service(&with.unwrap(), "front")), [] as [&str; 0]);
    assert_eq!(
        difference(set_service_pool(TEXT, "shop", "mail")),
        [r#"-pool = "web"   # not mail"#, r#"+pool = "mail"   # not mail"#]
    );
    let health = NewHealth { http: Some("/up".to_owned()), interval: Some("5s".to_owned()) };
    let pool = NewPool { backends: vec!["10.0.0.31:80".to_owned()], health: Some(health) };
    let with = add_pool(TEXT, "api", &pool);
    assert_eq!(
        difference(with.clone()),
        [
            "+[pools.api]",
            r#"+health = { http = "/up", interval = "5s" }"#,
            "+backends = [",
            r#"+  { address = "10.0.0.31:80" },"#,
            "+]",
            "+"
        ]
    );
    assert_eq!(difference(remove_pool(&with.unwrap(), "api")), [] as [&str; 0]);
    let first = add_pool("interfaces = [\"eth0\"]\n", "web", &NewPool::default()).unwrap();
    assert_eq!(first, "interfaces = [\"eth0\"]\n\n[pools.web]\nbackends = []\n");
}

#[test]
fn what_is_not_there_or_not_right_is_refused() {
    let stranger = address("10.9.9.9:1");
    let cases = [
        (remove_backend(TEXT, "web", stranger), "there is no backend 10.9.9.9:1 in pool \"web\""),
        (set_weight(TEXT, "web", stranger, 1), "there is no backend 10.9.9.9:1 in pool \"web\""),
        (add_backend(TEXT, "wbe", stranger, None), "there is no pool \"wbe\""),
        (remove_service(TEXT, "front"), "there is no service \"front\""),
        (set_service_pool(TEXT, "front", "web"), "there is no service \"front\""),
        (remove_pool(TEXT, "api"), "there is no pool \"api\""),
        (remove_pool(TEXT, "web"), "pool \"web\" is used by service \"shop\"; change that first"),
        (add_pool(TEXT, "web", &NewPool::default()), "there is a pool \"web\" already"),
        (
            add_backend(TEXT, "mail", address("10.0.0.21:25"), None),
            "there is a backend 10.0.0.21:25 in pool \"mail\" already",
        ),
        (add_service(TEXT, "shop", &NewService::default()), "there is a service \"shop\" already"),
    ];
    for (result, expected) in cases {
        let why = result.unwrap_err().to_string();
        // Then what there is instead.
        assert!(why == expected || why.starts_with(&format!("{expected}; ")), "{why}");
    }
    let refused = set_weight(TEXT, "web", address("10.0.0.11:8080"), 1001).unwrap_err().to_string();
    assert!(refused.contains("weight is out of range"), "{refused}");
    let refused = set_service_pool(TEXT, "shop", "wbe").unwrap_err().to_string();
    assert!(refused.contains("did you mean \"web\"?"), "{refused}");
    assert!(matches!(remove_service("interfaces = [", "shop"), Err(EditError::Refused(_))));
}

#[test]
fn deadlines_are_written_as_they_are_read() {
    for (epoch, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_825_599, "2000-02-29T11:59:59Z"),
        (1_796_061_600, "2026-11-30T18:00:00Z"),
        (4_107_542_400, "2100-03-01T00:00:00Z"),
    ] {
        assert_eq!(datetime(epoch).to_string(), text);
    }
}

proptest! {
    /// Any row of edits: each result checks, says what was asked, and every comment of a line that
    /// was not removed is still there.
    #[test]
    fn any_row_of_edits_keeps_document_and_comments(
        edits in prop::collection::vec((0u8..6, 0u8..5, any::<bool>()), 1..25),
    ) {
        let mut text = TEXT.to_owned();
        for (what, number, web) in edits {
            let pool = if web { "web" } else { "mail" };
            let backend = address(&format!("10.0.0.{}:{}", number + if web { 10 } else { 20 }, if web { 8080 } else { 25 }));
            let find = |text: &str| {
                let config = Document::parse(text).unwrap().config;
                let found = config.pools[pool].backends.iter().find(|other| other.address == backend);
                found.map(|found| (found.weight, found.admin))
            };
            let before = find(&text);
            let result = match what {
                0 => add_backend(&text, pool, backend, Some(7)),
                1 => remove_backend(&text, pool, backend),
                2 => set_weight(&text, pool, backend, 9),
                3 => set_admin(&text, pool, backend, Admin::Disabled),
                4 => set_admin(&text, pool, backend, Admin::Drain { deadline: Some(2_000_000_000) }),
                _ => set_admin(&text, pool, backend, Admin::Enabled),
            };
            prop_assert_eq!(result.is_ok(), before.is_none() == (what == 0), "{:?}", result);
            let Ok(after) = result else { continue };
            text = after;
            let expected = match (what, before) {
                (0, _) => Some((7, Admin::Enabled)),
                (2, Some((_, admin))) => Some((9, admin)),
                (3, Some((weight, _))) => Some((weight, Admin::Disabled)),
                (4, Some((weight, _))) => Some((weight, Admin::Drain { deadline: Some(2_000_000_000) })),
                (5, Some((weight, _))) => Some((weight, Admin::Enabled)),
                _ => None,
            };
            prop_assert_eq!(find(&text), expected);
            for comment in ["# The shop.", "# one leg", "# page servers", "# Rack 1", "# not mail"] {
                prop_assert!(text.contains(comment), "{} is gone:\n{}", comment, text);
            }
        }
    }
}

#[test]
fn what_is_not_there_is_named_with_what_is() {
    let there = "interfaces = [\"eth0\"]\n[pools.web]\nbackends = [{ address = \"10.0.0.11:80\" }]\n\
                 [services.shop]\nlisten = \"203.0.113.10:80/tcp\"\npool = \"web\"\n";
    let said = |outcome: Result<String, EditError>| outcome.unwrap_err().to_string();
    let address = |text: &str| text.parse().unwrap();
    assert_eq!(
        said(add_backend(there, "wbe", address("10.0.0.12:80"), None)),
        "there is no pool \"wbe\"; did you mean \"web\"?"
    );
    assert_eq!(
        said(remove_backend(there, "web", address("10.0.0.11:81"))),
        "there is no backend 10.0.0.11:81 in pool \"web\"; did you mean \"10.0.0.11:80\"?"
    );
    assert_eq!(said(remove_service(there, "accounts")), "there is no service \"accounts\"; write \"shop\"");
    let nothing = "interfaces = [\"eth0\"]\n";
    assert_eq!(said(remove_pool(nothing, "web")), "there is no pool \"web\"; there are no pools");
}

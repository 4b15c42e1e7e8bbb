//! The proxies that are compared, side by side on the lab's balancer.

use std::{collections::BTreeMap, fs, net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use tests::stage::Stage;
use xtask::lab::{Proc, VIP};

use crate::load::Case;

/// The name that they are called by.
pub(crate) const HOST: &str = "shop.example";

const PORT: u16 = 8080;

/// The desk, nginx and HAProxy; and the backend without any.
pub(crate) struct Proxies {
    by_name: BTreeMap<&'static str, Proxy>,
}

struct Proxy {
    plain: SocketAddr,
    tls: Option<SocketAddr>,
    /// Its first process; the others are its children.
    process: Option<u32>,
    /// Ended with it.
    _running: Option<Proc>,
}

impl Proxies {
    /// Starts them all, before the first backend.
    pub(crate) fn start(stage: &mut Stage) -> Result<Self> {
        let backend = SocketAddr::new(stage.lab.backend_v4(0).into(), PORT);
        let made = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let directory = stage.directory().to_owned();
        fs::write(directory.join("shop.pem"), &certificate)?;
        fs::write(directory.join("shop.key"), &key)?;
        // HAProxy wants both in one file.
        fs::write(directory.join("shop.both"), certificate + &key)?;

        stage.write(&format!(
            "interfaces = [\"front\", \"back\"]\n\
             [pools.web]\nbackends = [{{ address = \"{backend}\" }}]\n\
             [services.plain]\nlisten = \"{VIP}:80/tcp\"\nroutes = [{{ pool = \"web\" }}]\n\
             [services.front]\nlisten = \"{VIP}:443/tcp\"\npool = \"web\"\n\
             tls = {{ cert = \"shop.pem\", key = \"shop.key\" }}\n"
        ))?;
        stage.start()?;
        let front = stage.lab.front_v4();
        let at = |port| Some(SocketAddr::new(front.into(), port));
        let daemon = stage.daemon.as_ref().context("a daemon has been started")?.id();
        let desk = Proxy {
            plain: SocketAddr::new(VIP.into(), 80),
            tls: Some(SocketAddr::new(VIP.into(), 443)),
            process: Some(daemon),
            _running: None,
        };

        let nginx = directory.join("proxy");
        fs::create_dir_all(&nginx)?;
        fs::write(nginx.join("nginx.conf"), nginx_configuration(stage, backend))?;
        let mut command = stage.lab.balancer.command("nginx");
        command.arg("-p").arg(&nginx).args(["-c", "nginx.conf"]);
        let nginx = Self::launch(command, at(8081), at(8443))?;

        let haproxy = directory.join("haproxy.cfg");
        fs::write(&haproxy, haproxy_configuration(stage, backend))?;
        let mut command = stage.lab.balancer.command("haproxy");
        command.arg("-f").arg(&haproxy);
        let haproxy = Self::launch(command, at(8082), at(8444))?;

        let direct = Proxy { plain: backend, tls: None, process: None, _running: None };
        let by_name =
            BTreeMap::from([("desk", desk), ("direct", direct), ("haproxy", haproxy), ("nginx", nginx)]);
        for proxy in by_name.values() {
            [Some(proxy.plain), proxy.tls]
                .into_iter()
                .flatten()
                .try_for_each(|a| stage.lab.client.wait_for_tcp(a))?;
        }
        Ok(Self { by_name })
    }

    fn launch(
        mut command: std::process::Command,
        plain: Option<SocketAddr>,
        tls: Option<SocketAddr>,
    ) -> Result<Proxy> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let running = Proc::start(command)?;
        let plain = plain.context("an address")?;
        Ok(Proxy { plain, tls, process: Some(running.id()), _running: Some(running) })
    }

    /// Those that can do what a case asks for.
    pub(crate) fn of(&self, case: &Case) -> Vec<&'static str> {
        let can = |proxy: &Proxy| !case.tls || proxy.tls.is_some();
        self.by_name.iter().filter(|(_, proxy)| can(proxy)).map(|(name, _)| *name).collect()
    }

    /// Where one listens.
    pub(crate) fn address(&self, name: &str, tls: bool) -> SocketAddr {
        let proxy = &self.by_name[name];
        proxy.tls.filter(|_| tls).unwrap_or(proxy.plain)
    }

    /// The processor time that one's processes have spent; nothing where there is no proxy.
    pub(crate) fn cpu_time(&self, name: &str) -> Result<Option<Duration>> {
        self.by_name[name].process.map(cpu_time_of_tree).transpose()
    }
}

/// The processor time of a process and all below it, by their clocks (clock_getcpuclockid(3)).
fn cpu_time_of_tree(process: u32) -> Result<Duration> {
    let parents = parents()?;
    let mut tree = vec![process];
    let mut next = 0;
    while let Some(&one) = tree.get(next) {
        tree.extend(parents.iter().filter(|(_, parent)| *parent == one).map(|(child, _)| *child));
        next += 1;
    }
    let clock = |process: u32| -> Result<Duration> {
        let id = clock_getcpuclockid(Pid::from_raw(process.cast_signed()))?;
        Ok(clock_gettime(id)?.into())
    };
    tree.into_iter().map(clock).sum()
}

/// All processes, each with its parent.
fn parents() -> Result<Vec<(u32, u32)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(process) = entry?.file_name().to_string_lossy().parse() else { continue };
        // It may have ended meanwhile.
        let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else { continue };
        // Behind the name, which is in brackets and may contain anything: the state, the parent (proc(5)).
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
        all.push((process, parent.context("a parent")?.parse()?));
    }
    Ok(all)
}

fn nginx_configuration(stage: &Stage, backend: SocketAddr) -> String {
    let directory = stage.directory().display();
    format!(
        "daemon off; pid nginx.pid; error_log stderr; worker_processes auto;\n\
         events {{ worker_connections 8192; }}\n\
         http {{ access_log off; keepalive_requests 1000000;\n\
         client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;\n\
         upstream web {{ server {backend}; keepalive 256; keepalive_requests 1000000; }}\n\
         server {{ listen 8081 backlog=4096; listen 8443 ssl http2 backlog=4096;\n\
         ssl_certificate {directory}/shop.pem; ssl_certificate_key {directory}/shop.key;\n\
         ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache off;\n\
         location / {{ proxy_pass http://web; proxy_http_version 1.1; proxy_set_header Connection \"\";\n\
         proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n\
         proxy_set_header X-Forwarded-Proto $scheme; proxy_set_header X-Request-Id $request_id;\n\
         proxy_buffers 16 8k; proxy_max_temp_file_size 0; }} }} }}\n"
    )
}

fn haproxy_configuration(stage: &Stage, backend: SocketAddr) -> String {
    let directory = stage.directory().display();
    format!(
        "global\n  maxconn 8192\n\
         defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         \x20 http-reuse always\n  option forwardfor\n  unique-id-format %{{+X}}o%ci%cp%Ts%rt\n  unique-id-header X-Request-Id\n\
         frontend plain\n  bind :8082\n  http-request set-header X-Forwarded-Proto http\n  default_backend web\n\
         frontend front\n  bind :8444 ssl crt {directory}/shop.both alpn h2,http/1.1\n\
         \x20 http-request set-header X-Forwarded-Proto https\n  default_backend web\n\
         backend web\n  server b1 {backend}\n"
    )
}

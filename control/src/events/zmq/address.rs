//! Addresses of ZMQ: `tcp://IP:PORT`, the URL that names brokers, and which address of this host
//! others are told (spec/events-discovery.md §3.5, §3.6, §3.7).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use thiserror::Error;

use crate::config::routed;

/// Why a text is no address here.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum AddressError {
    /// Not `tcp://HOST:PORT`.
    #[error("{0:?} is no ZMQ address over TCP; write tcp://IP:PORT, IPv6 in brackets")]
    Endpoint(String),
    /// A host name has no address.
    #[error("{0:?} cannot be resolved: {1}")]
    Unresolved(String, String),
    /// Not the two lists that name brokers.
    #[error(
        "{0:?} names no broker (DYN_ZMQ_BROKER_URL); write \
         xsub=tcp://HOST:5555,xpub=tcp://HOST:5556"
    )]
    Broker(String),
    /// Not an address that others could dial.
    #[error(
        "DYN_EVENT_PLANE_HOST: {0:?} is no address of this host that others can dial; write an IP \
         address or the name of a network interface"
    )]
    Host(String),
}

/// Reads `tcp://IP:PORT`.
pub(super) fn endpoint(text: &str) -> Result<SocketAddr, AddressError> {
    let address = text.strip_prefix("tcp://").map(str::parse);
    match address {
        Some(Ok(address)) => Ok(address),
        _ => Err(AddressError::Endpoint(text.to_owned())),
    }
}

/// Writes it.
pub(super) fn url(address: SocketAddr) -> String {
    format!("tcp://{address}")
}

/// Finds the addresses of endpoints that may have host names.
pub(super) async fn resolve(endpoints: &[String]) -> Result<Vec<SocketAddr>, AddressError> {
    let mut found = Vec::new();
    for text in endpoints {
        if let Ok(address) = endpoint(text) {
            found.push(address);
            continue;
        }
        let Some(host) = text.strip_prefix("tcp://") else {
            return Err(AddressError::Endpoint(text.clone()));
        };
        let unresolved = |why: String| AddressError::Unresolved(text.clone(), why);
        let mut addresses = tokio::net::lookup_host(host)
            .await
            .map_err(|error| unresolved(error.to_string()))?;
        let address = addresses.next();
        found.push(address.ok_or_else(|| unresolved("no address".to_owned()))?);
    }
    Ok(found)
}

/// Brokers by their addresses: `xsub=A;B , xpub=C;D`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct BrokerUrl {
    /// Where publishers connect, to all of them.
    pub xsub: Vec<String>,
    /// Where subscribers connect, to all of them.
    pub xpub: Vec<String>,
}

impl FromStr for BrokerUrl {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError::Broker(text.to_owned());
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        let [one, two] = parts.as_slice() else {
            return Err(wrong());
        };
        let list = |key: &str| {
            let value = [one, two]
                .into_iter()
                .find_map(|part| part.strip_prefix(key));
            let items = value?.split(';').map(|item| item.trim().to_owned());
            let items: Vec<String> = items.filter(|item| !item.is_empty()).collect();
            let good = items.iter().all(|item| item.starts_with("tcp://"));
            (good && !items.is_empty()).then_some(items)
        };
        match (list("xsub="), list("xpub=")) {
            (Some(xsub), Some(xpub)) => Ok(BrokerUrl { xsub, xpub }),
            _ => Err(wrong()),
        }
    }
}

/// The address that others are told, as `DYN_EVENT_PLANE_HOST` says: an IP address, the name of
/// an interface, or nothing.
pub(super) fn host(said: Option<&str>) -> Result<IpAddr, AddressError> {
    let Some(said) = said.map(str::trim).filter(|said| !said.is_empty()) else {
        return Ok(automatic());
    };
    let usable = |address: &IpAddr| !address.is_unspecified();
    let address = match said.parse::<IpAddr>() {
        Ok(address) => Some(address),
        Err(_) => best(addresses(|name, _| name == said)),
    };
    let address = address.filter(usable);
    address.ok_or_else(|| AddressError::Host(said.to_owned()))
}

/// IPv4 before IPv6, and that of the route to the outside before others.
fn automatic() -> IpAddr {
    let of = |any: IpAddr| routed(any).filter(|address| !address.is_loopback());
    let outside = |_: &str, flags: InterfaceFlags| !flags.contains(InterfaceFlags::IFF_LOOPBACK);
    let any_v4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let found = of(any_v4)
        .or_else(|| best(addresses(outside)))
        .or_else(|| of(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
    found.unwrap_or_else(|| {
        tracing::warn!(
            "events: this host has no address but loopback; subscribers elsewhere cannot dial it \
             (DYN_EVENT_PLANE_HOST names another)"
        );
        Ipv4Addr::LOCALHOST.into()
    })
}

/// Addresses of the interfaces that are up and wanted.
fn addresses(wanted: impl Fn(&str, InterfaceFlags) -> bool) -> Vec<IpAddr> {
    let interfaces = getifaddrs().into_iter().flatten();
    let up = interfaces.filter(|interface| {
        let flags = interface.flags;
        flags.contains(InterfaceFlags::IFF_UP) && wanted(&interface.interface_name, flags)
    });
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    up.filter_map(address).collect()
}

/// The first IPv4, else the first IPv6 that is more than local to its link.
fn best(addresses: Vec<IpAddr>) -> Option<IpAddr> {
    let is_wide = |address: &&IpAddr| match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    let v4 = addresses.iter().find(|address| address.is_ipv4());
    v4.or_else(|| addresses.iter().find(is_wide)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec/events-discovery.md §3.7: IPv6 has to be in brackets.
    #[test]
    fn endpoints_are_ip_addresses_over_tcp() {
        assert_eq!(
            endpoint("tcp://10.0.0.1:5"),
            Ok("10.0.0.1:5".parse().unwrap())
        );
        assert_eq!(endpoint("tcp://[::1]:5"), Ok("[::1]:5".parse().unwrap()));
        assert_eq!(url("[::1]:5".parse().unwrap()), "tcp://[::1]:5");
        for wrong in [
            "tcp://::1:5",
            "tcp://host:5",
            "ipc:///x",
            "10.0.0.1:5",
            "tcp://1.2.3.4",
        ] {
            assert_eq!(
                endpoint(wrong),
                Err(AddressError::Endpoint(wrong.to_owned()))
            );
        }
    }

    /// spec/events-discovery.md §3.6, the URL's grammar.
    #[test]
    fn brokers_are_two_lists() {
        let url: BrokerUrl = "xsub=tcp://b1:5555;tcp://b2:5555 , xpub=tcp://b1:5556;tcp://b2:5556"
            .parse()
            .unwrap();
        assert_eq!(url.xsub, ["tcp://b1:5555", "tcp://b2:5555"]);
        assert_eq!(url.xpub, ["tcp://b1:5556", "tcp://b2:5556"]);
        let turned: BrokerUrl = " xpub=tcp://c:2 ,xsub=tcp://c:1".parse().unwrap();
        assert_eq!(
            (&*turned.xsub[0], &*turned.xpub[0]),
            ("tcp://c:1", "tcp://c:2")
        );
        for wrong in [
            "",
            "tcp://b:5555",
            "xsub=tcp://b:1",
            "xsub=tcp://b:1,xsub=tcp://b:2",
            "xsub=,xpub=tcp://b:2",
            "xsub=;,xpub=tcp://b:2",
            "xsub=b:1,xpub=tcp://b:2",
            "xsub=tcp://b:1,xpub=tcp://b:2,xpub=tcp://b:3",
        ] {
            let error = wrong.parse::<BrokerUrl>().unwrap_err();
            assert_eq!(error, AddressError::Broker(wrong.to_owned()));
        }
    }

    /// spec/events-discovery.md §3.7: a literal, an interface's exact name; no wildcard.
    #[test]
    fn the_host_is_said_or_found() {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        assert_eq!(host(Some("127.0.0.1")), Ok(loopback));
        assert_eq!(host(Some("lo")), Ok(loopback));
        assert_eq!(host(Some(" ::1 ")), Ok(Ipv6Addr::LOCALHOST.into()));
        for wrong in ["0.0.0.0", "::", "no-such-interface", "host.example"] {
            assert_eq!(host(Some(wrong)), Err(AddressError::Host(wrong.to_owned())));
        }
        for unset in [None, Some(""), Some("  ")] {
            assert!(!host(unset).unwrap().is_unspecified());
        }
    }

    #[tokio::test]
    async fn names_are_resolved() {
        let endpoints = [
            "tcp://localhost:7".to_owned(),
            "tcp://127.0.0.1:8".to_owned(),
        ];
        let found = resolve(&endpoints).await.unwrap();
        assert!(found[0].ip().is_loopback() && found[0].port() == 7);
        assert_eq!(found[1], "127.0.0.1:8".parse().unwrap());
        assert!(resolve(&["inproc://x".to_owned()]).await.is_err());
    }
}

package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// A Source returns the identity to use now. It is asked at every handshake.
type Source func() (*Identity, error)

// ServerConfig returns a configuration that serves with the identity of
// source, to callers of role peer only.
func ServerConfig(source Source, peer Role) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			id, err := source()
			if err != nil {
				return nil, err
			}
			pair, trusted, err := id.parse()
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:             tls.VersionTLS13,
				NextProtos:             []string{"h2"},
				Certificates:           []tls.Certificate{pair},
				ClientAuth:             tls.RequireAnyClientCert,
				SessionTicketsDisabled: true, // a resumed session would skip the check
				VerifyConnection:       verify(peer, trusted, time.Now),
			}, nil
		},
	}
}

// ClientConfig returns a configuration that calls servers of role peer only,
// with the identity of source.
func ClientConfig(source Source, peer Role) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: peer.Name,
		NextProtos: []string{"h2"},
		// The standard check has one bundle for ever; VerifyConnection does all
		// of it with the current one.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := source()
			if err != nil {
				return err
			}
			_, trusted, err := id.parse()
			if err != nil {
				return err
			}
			return verify(peer, trusted, time.Now)(state)
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			id, err := source()
			if err != nil {
				return nil, err
			}
			pair, _, err := id.parse()
			return &pair, err
		},
	}
}

// verify returns a check of the peer's certificate: signed by a CA of trusted,
// valid at the time that now tells, for role and its direction.
func verify(role Role, trusted *x509.CertPool, now func() time.Time) func(tls.ConnectionState) error {
	return func(state tls.ConnectionState) error {
		if len(state.PeerCertificates) == 0 {
			return errors.New("pki: the peer has no certificate")
		}
		_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
			DNSName: role.Name, Roots: trusted, CurrentTime: now(), KeyUsages: []x509.ExtKeyUsage{role.usage()},
		})
		if err != nil {
			return fmt.Errorf("pki: the peer is no %s: %w", role.Name, err)
		}
		return nil
	}
}

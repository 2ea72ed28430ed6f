package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"time"
)

// A Role is who a certificate speaks for: its name, and whether it serves or calls.
type Role struct {
	Name   string // its DNS name
	Serves bool
}

// The roles of the driver's own processes.
var (
	Node       = Role{Name: "node.csi-qcow2.internal", Serves: true}
	Controller = Role{Name: "controller.csi-qcow2.internal"}
)

func (r Role) usage() x509.ExtKeyUsage {
	if r.Serves {
		return x509.ExtKeyUsageServerAuth
	}
	return x509.ExtKeyUsageClientAuth
}

// An Identity is one side of a connection.
type Identity struct {
	Certificate []byte // PEM
	Key         []byte // PEM
	Bundle      []byte // PEM: whom to trust
}

// Issue makes a new identity for role.
func (a *Authority) Issue(role Role, now time.Time) (*Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	by := a.signer(now)
	end := now.Add(leafLife)
	if end.After(by.cert.NotAfter) {
		end = by.cert.NotAfter
	}
	cert, err := sign(&x509.Certificate{
		Subject:     pkix.Name{CommonName: role.Name},
		DNSNames:    []string{role.Name},
		NotBefore:   now.Add(-skew),
		NotAfter:    end,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{role.usage()},
	}, by.cert, key, by.key)
	if err != nil {
		return nil, err
	}
	text, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	return &Identity{
		Certificate: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}),
		Key:         text,
		Bundle:      a.Certificates(),
	}, nil
}

// Current reports whether id need not be issued again at now: it is role's, is
// signed by the CA that signs, has a third of its life left, and knows whom a
// trusts.
func (a *Authority) Current(id *Identity, role Role, now time.Time) bool {
	pair, err := tls.X509KeyPair(id.Certificate, id.Key)
	if err != nil || !bytes.Equal(id.Bundle, a.Certificates()) {
		return false
	}
	return pair.Leaf.VerifyHostname(role.Name) == nil &&
		pair.Leaf.CheckSignatureFrom(a.signer(now).cert) == nil &&
		now.Before(renewalOf(pair.Leaf))
}

// parse returns the key pair and the bundle of id.
func (id *Identity) parse() (tls.Certificate, *x509.CertPool, error) {
	pair, err := tls.X509KeyPair(id.Certificate, id.Key)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("pki: %w", err)
	}
	trusted, err := parseCertificates(id.Bundle)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	pool := x509.NewCertPool()
	for _, cert := range trusted {
		pool.AddCert(cert)
	}
	return pair, pool, nil
}

package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

const (
	authorityLife = 365 * 24 * time.Hour
	leafLife      = 30 * 24 * time.Hour
	// overlap is how long a CA is in the bundle before it signs: long enough
	// for every peer to have read the bundle again.
	overlap = 24 * time.Hour
	// skew is how far the clocks of peers may be apart.
	skew = time.Hour
)

// An Authority signs the certificates of one installation.
type Authority struct {
	cas []ca // the oldest first; not empty
}

type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// made returns when c was made: certificates are dated back by skew.
func (c ca) made() time.Time { return c.cert.NotBefore.Add(skew) }

// ParseAuthority reads what Authority.Certificates and Keys wrote.
func ParseAuthority(certificates, keys []byte) (*Authority, error) {
	certs, err := parseCertificates(certificates)
	if err != nil {
		return nil, err
	}
	a := &Authority{}
	for _, cert := range certs {
		var block *pem.Block
		if block, keys = pem.Decode(keys); block == nil {
			return nil, errors.New("pki: fewer keys than CA certificates")
		}
		key, err := x509.ParseECPrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("pki: CA key: %w", err)
		}
		if !key.PublicKey.Equal(cert.PublicKey) || !cert.IsCA {
			return nil, errors.New("pki: a CA certificate and its key do not belong together")
		}
		a.cas = append(a.cas, ca{cert, key})
	}
	return a, nil
}

func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("pki: certificate: %w", err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("pki: no certificate")
	}
	return certs, nil
}

// Renew returns the authority that is to be used at now, and whether it is
// another than a. A nil a gives a new one.
func (a *Authority) Renew(now time.Time) (next *Authority, changed bool, err error) {
	next = &Authority{}
	if a != nil {
		next.cas = slices.DeleteFunc(slices.Clone(a.cas), func(c ca) bool { return now.After(c.cert.NotAfter) })
		changed = len(next.cas) != len(a.cas)
	}
	if n := len(next.cas); n == 0 || now.After(renewalOf(next.cas[n-1].cert)) {
		c, err := newCA(now)
		if err != nil {
			return nil, false, err
		}
		next.cas, changed = append(next.cas, c), true
	}
	return next, changed, nil
}

// renewalOf returns when two thirds of cert's life are over.
func renewalOf(cert *x509.Certificate) time.Time {
	return cert.NotAfter.Add(-cert.NotAfter.Sub(cert.NotBefore) / 3)
}

func newCA(now time.Time) (ca, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return ca{}, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "csi-qcow2"},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(authorityLife),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	cert, err := sign(template, template, key, key)
	return ca{cert, key}, err
}

// sign makes a certificate of template for the key pair of subject.
func sign(template, parent *x509.Certificate, subject, issuer *ecdsa.PrivateKey) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &subject.PublicKey, issuer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// signer returns the CA that signs at now: the youngest that everyone trusts.
func (a *Authority) signer(now time.Time) ca {
	for _, c := range slices.Backward(a.cas) {
		if !now.Before(c.made().Add(overlap)) {
			return c
		}
	}
	return a.cas[0]
}

// Certificates returns the bundle in PEM.
func (a *Authority) Certificates() []byte {
	var b bytes.Buffer
	for _, c := range a.cas {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
	}
	return b.Bytes()
}

// Keys returns the keys of Certificates in PEM, in the same order.
func (a *Authority) Keys() ([]byte, error) {
	var b bytes.Buffer
	for _, c := range a.cas {
		text, err := encodeKey(c.key)
		if err != nil {
			return nil, err
		}
		b.Write(text)
	}
	return b.Bytes(), nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

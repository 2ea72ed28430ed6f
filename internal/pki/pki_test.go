package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

const day = 24 * time.Hour

func mustRenew(t *testing.T, a *Authority, now time.Time) (*Authority, bool) {
	t.Helper()
	next, changed, err := a.Renew(now)
	if err != nil {
		t.Fatal(err)
	}
	return next, changed
}

func mustIssue(t *testing.T, a *Authority, role Role, now time.Time) *Identity {
	t.Helper()
	id, err := a.Issue(role, now)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// shake makes a connection between two identities and returns the error of
// each side.
func shake(t *testing.T, server, client Source) (serverErr, clientErr error) {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() { // ends with the handshake
		conn := tls.Server(a, ServerConfig(server, Controller))
		err := conn.Handshake()
		if err == nil {
			_, err = conn.Write([]byte("hello"))
		}
		a.Close()
		done <- err
	}()
	conn := tls.Client(b, ClientConfig(client, Node))
	clientErr = conn.Handshake()
	if clientErr == nil {
		_, clientErr = conn.Read(make([]byte, 5)) // a refused client learns it here
	}
	b.Close()
	return <-done, clientErr
}

func fixed(id *Identity) Source { return func() (*Identity, error) { return id, nil } }

// TestYears plays three years, six hours each: whatever the age of the identity
// that either side has read last, at most six hours ago, they understand each
// other, and nothing ever expires in use.
func TestYears(t *testing.T) {
	now := time.Now()
	authority, changed := mustRenew(t, nil, now)
	if !changed {
		t.Fatal("a new authority is no change")
	}
	node, controller := mustIssue(t, authority, Node, now), mustIssue(t, authority, Controller, now)
	renewals, authorities := 0, 1
	for end := now.Add(3 * 365 * day); now.Before(end); now = now.Add(6 * time.Hour) {
		before := node
		if authority, changed = mustRenew(t, authority, now); changed {
			authorities++
			if n := len(authority.cas); n < 1 || n > 2 {
				t.Fatalf("there are %d CAs", n)
			}
		}
		changed = false
		if !authority.Current(node, Node, now) {
			node, changed = mustIssue(t, authority, Node, now), true
			renewals++
		}
		if !changed && renewals > 0 {
			continue
		}
		// The controller has not looked yet, then it has; so with the node.
		for _, pair := range [][2]*Identity{{before, controller}, {node, controller}} {
			verifyBoth(t, pair[0], pair[1], now)
		}
		if !authority.Current(controller, Controller, now) {
			controller = mustIssue(t, authority, Controller, now)
		}
		for _, pair := range [][2]*Identity{{before, controller}, {node, controller}} {
			verifyBoth(t, pair[0], pair[1], now)
		}
	}
	if renewals < 3*365/30 || authorities < 4 {
		t.Errorf("%d renewals of %d authorities in three years", renewals, authorities)
	}
}

// verifyBoth checks that two identities accept each other at now.
func verifyBoth(t *testing.T, node, controller *Identity, now time.Time) {
	t.Helper()
	pairs := []struct {
		id      *Identity
		role    Role
		trusted *Identity
	}{{node, Node, controller}, {controller, Controller, node}}
	for _, p := range pairs {
		if err := acceptedAt(p.id, p.role, p.trusted, now); err != nil {
			t.Fatalf("%s: %v", now, err)
		}
	}
}

func acceptedAt(id *Identity, role Role, by *Identity, now time.Time) error {
	pair, _, err := id.parse()
	if err != nil {
		return err
	}
	_, trusted, err := by.parse()
	if err != nil {
		return err
	}
	state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{pair.Leaf}}
	return verify(role, trusted, func() time.Time { return now })(state)
}

func TestHandshake(t *testing.T) {
	now := time.Now()
	a, _ := mustRenew(t, nil, now)
	other, _ := mustRenew(t, nil, now)
	node, controller := mustIssue(t, a, Node, now), mustIssue(t, a, Controller, now)
	if serverErr, clientErr := shake(t, fixed(node), fixed(controller)); serverErr != nil || clientErr != nil {
		t.Errorf("server %v, client %v", serverErr, clientErr)
	}
	stranger := mustIssue(t, other, Controller, now)
	stranger.Bundle = a.Certificates()
	imposter := mustIssue(t, other, Node, now)
	imposter.Bundle = a.Certificates()
	old := mustIssue(t, a, Controller, now.Add(-leafLife-skew))
	for name, pair := range map[string][2]*Identity{
		"a stranger calls":           {node, stranger},
		"an imposter serves":         {imposter, controller},
		"a node calls":               {node, mustIssue(t, a, Node, now)},
		"a controller serves":        {mustIssue(t, a, Controller, now), controller},
		"an expired certificate":     {node, old},
		"another role calls":         {node, mustIssue(t, a, Role{Name: "x"}, now)},
		"a garbled certificate":      {node, {Certificate: []byte("x"), Key: controller.Key, Bundle: controller.Bundle}},
		"nobody is trusted (server)": {{Certificate: node.Certificate, Key: node.Key}, controller},
	} {
		serverErr, clientErr := shake(t, fixed(pair[0]), fixed(pair[1]))
		if serverErr == nil || clientErr == nil {
			t.Errorf("%s: server %v, client %v", name, serverErr, clientErr)
		}
	}
}

// TestFiles: what kubelet puts into the directory counts at the next handshake.
func TestFiles(t *testing.T) {
	now := time.Now()
	dir := t.TempDir()
	source := Files(dir)
	if _, err := source(); err == nil {
		t.Fatal("an empty directory has an identity")
	}
	a, _ := mustRenew(t, nil, now)
	b, _ := mustRenew(t, nil, now)
	for i, authority := range []*Authority{a, b} {
		generation := filepath.Join(dir, []string{"..1", "..2"}[i])
		id := mustIssue(t, authority, Node, now)
		if err := os.Mkdir(generation, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string][]byte{CertificateName: id.Certificate, KeyName: id.Key, BundleName: id.Bundle} {
			if err := os.WriteFile(filepath.Join(generation, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		// As kubelet does it: a new link, renamed over the old.
		if err := os.Symlink(filepath.Base(generation), filepath.Join(dir, "..next")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..next"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		if serverErr, clientErr := shake(t, source, fixed(mustIssue(t, authority, Controller, now))); serverErr != nil || clientErr != nil {
			t.Errorf("generation %d: server %v, client %v", i, serverErr, clientErr)
		}
	}
}

func TestAuthorityInPEM(t *testing.T) {
	now := time.Now()
	a, _ := mustRenew(t, nil, now)
	a, changed := mustRenew(t, a, now.Add(300*day)) // two CAs
	if !changed || len(a.cas) != 2 {
		t.Fatalf("changed %v, %d CAs", changed, len(a.cas))
	}
	keys, err := a.Keys()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseAuthority(a.Certificates(), keys)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(back.Certificates(), a.Certificates()) {
		t.Error("the bundle has changed")
	}
	if back.signer(now.Add(300 * day)).cert.Equal(a.cas[1].cert) {
		t.Error("a CA signs that nobody knows yet")
	}
	if !back.signer(now.Add(300*day + overlap)).cert.Equal(a.cas[1].cert) {
		t.Error("the new CA does not sign after the overlap")
	}
	b, _ := mustRenew(t, nil, now)
	foreign, err := b.Keys()
	if err != nil {
		t.Fatal(err)
	}
	leaf := mustIssue(t, a, Node, now)
	for name, parts := range map[string][2][]byte{
		"nothing":         {nil, nil},
		"no keys":         {a.Certificates(), nil},
		"foreign key":     {b.Certificates(), keys},
		"one key for two": {a.Certificates(), foreign},
		"not PEM":         {[]byte("x"), keys},
		"not a CA":        {leaf.Certificate, leaf.Key},
	} {
		if _, err := ParseAuthority(parts[0], parts[1]); err == nil {
			t.Errorf("%s: it parses", name)
		}
	}
}

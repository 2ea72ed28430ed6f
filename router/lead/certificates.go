package lead

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/pki"
)

// authorityKeys is the key of the CA keys in the authority's Secret.
const authorityKeys = "ca.key"

// Certificates keeps the authority and the identities that it issues in Secrets.
type Certificates struct {
	Secrets   typedcorev1.SecretInterface
	Authority string              // name of the Secret with the CA
	Issue     map[string]pki.Role // whose identities are kept, by the name of their Secret
	Now       func() time.Time
	// Publish, if not nil, makes the bundle known to those who mount no Secret.
	Publish func(ctx context.Context, bundle []byte) error

	own atomic.Pointer[pki.Identity] // the controller's
}

// Renew makes and renews what is missing or old. It is the leader's.
func (c *Certificates) Renew(ctx context.Context) error {
	authority, err := c.renewAuthority(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for name, role := range c.Issue {
		errs = append(errs, c.renew(ctx, authority, name, role))
	}
	if c.Publish != nil {
		errs = append(errs, c.Publish(ctx, authority.Certificates()))
	}
	return errors.Join(errs...)
}

// renew makes the identity in the Secret name again, if it is not current.
func (c *Certificates) renew(ctx context.Context, authority *pki.Authority, name string, role pki.Role) error {
	secret, err := c.get(ctx, name)
	if err != nil {
		return err
	}
	id := &pki.Identity{
		Certificate: secret.Data[pki.CertificateName],
		Key:         secret.Data[pki.KeyName],
		Bundle:      secret.Data[pki.BundleName],
	}
	if authority.Current(id, role, c.Now()) {
		return nil
	}
	if id, err = authority.Issue(role, c.Now()); err != nil {
		return err
	}
	return c.update(ctx, secret, map[string][]byte{
		pki.CertificateName: id.Certificate, pki.KeyName: id.Key, pki.BundleName: id.Bundle,
	})
}

func (c *Certificates) renewAuthority(ctx context.Context) (*pki.Authority, error) {
	secret, err := c.get(ctx, c.Authority)
	if err != nil {
		return nil, err
	}
	var authority *pki.Authority
	if len(secret.Data) > 0 {
		if authority, err = parseAuthority(secret); err != nil {
			return nil, err
		}
	}
	authority, changed, err := authority.Renew(c.Now())
	if err != nil || !changed {
		return authority, err
	}
	keys, err := authority.Keys()
	if err != nil {
		return nil, err
	}
	return authority, c.update(ctx, secret, map[string][]byte{pki.BundleName: authority.Certificates(), authorityKeys: keys})
}

func parseAuthority(secret *corev1.Secret) (*pki.Authority, error) {
	authority, err := pki.ParseAuthority(secret.Data[pki.BundleName], secret.Data[authorityKeys])
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w; remove its data to have a new CA made", secret.Name, err)
	}
	return authority, nil
}

// Load makes this replica's own identity from the authority. Every replica
// does so now and then; Own returns the last.
func (c *Certificates) Load(ctx context.Context) error {
	secret, err := c.get(ctx, c.Authority)
	if err != nil {
		return err
	}
	if len(secret.Data) == 0 {
		return errors.New("no CA yet: the leader makes it")
	}
	authority, err := parseAuthority(secret)
	if err != nil {
		return err
	}
	if own := c.own.Load(); own != nil && authority.Current(own, pki.Controller, c.Now()) {
		return nil
	}
	own, err := authority.Issue(pki.Controller, c.Now())
	if err != nil {
		return err
	}
	c.own.Store(own)
	klog.FromContext(ctx).V(2).Info("controller has a new certificate")
	return nil
}

// Own is a pki.Source of the controller's identity.
func (c *Certificates) Own() (*pki.Identity, error) {
	if own := c.own.Load(); own != nil {
		return own, nil
	}
	return nil, errors.New("the controller has no certificate yet")
}

func (c *Certificates) get(ctx context.Context, name string) (*corev1.Secret, error) {
	secret, err := c.Secrets.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: %w", err, errNoSecret)
	}
	return secret, err
}

// update replaces the data of the Secret that was read, unless another did.
func (c *Certificates) update(ctx context.Context, secret *corev1.Secret, data map[string][]byte) error {
	secret = secret.DeepCopy()
	secret.Data = maps.Clone(data)
	if _, err := c.Secrets.Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
		return err
	}
	klog.FromContext(ctx).V(2).Info("certificates renewed", "secret", secret.Name)
	return nil
}

// Package kms keeps the signing keys of a server where they do not come out: in a
// TPM, in a PKCS #11 token, in the key service of a cloud, or in the transit
// engine of a HashiCorp Vault. A URI says where; [Check] says what is wrong with
// one, [Open] opens the key manager.
//
// Each key has a name, unlike any other of the server's. Beside it the service is
// told the trust domain and the server, by which keys are found and listed, so
// that several servers can have theirs in one place.
//
// Services are asked within bounds of time and size. When one cannot be used, what
// needs it fails at once with [ErrUnavailable], until it can be again. What it
// signs is verified.
package kms

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/pkg/config"
)

// ErrUnavailable says that the key manager has the keys but cannot be reached or
// does not sign. Try again.
var ErrUnavailable = errors.New("the keys of the authorities cannot be used now; try again")

// Options say where [Open] keeps keys.
type Options struct {
	URI         string               // see [Check]
	PIN         string               // of a PKCS #11 token, or of a TPM's owner hierarchy; empty: it needs none
	Dir         string               // where a TPM's keys are, unless the URI says; made if it is missing
	TrustDomain spiffeid.TrustDomain // whose keys they are
	Server      string               // its name
	Now         func() time.Time     // nil: time.Now
	Log         *slog.Logger         // nil: none
}

func (o Options) owner() owner { return owner{o.TrustDomain.Name(), o.Server} }

// attributes are what a URI says, by name.
type attributes map[string]string

// scheme is a kind of key manager.
type scheme struct {
	what       string   // in errors and logs
	example    string   // of a URI
	attributes []string // that there may be
	check      func(attributes) error
	open       func(context.Context, Options, attributes) (service, error)
}

var schemes = map[string]scheme{
	"awskms": {
		"AWS KMS", "awskms:region=eu-central-1", []string{"region", "profile", "endpoint"}, checkAWS, openAWS,
	},
	"azurekms": {
		"Azure Key Vault", "azurekms:vault=NAME", []string{"vault", "hsm", "endpoint"}, checkAzure, openAzure,
	},
	"cloudkms": {
		"Google Cloud KMS", "cloudkms:project=PROJECT;location=LOCATION;key-ring=RING",
		[]string{"project", "location", "key-ring", "protection-level", "endpoint"}, checkGoogle, openGoogle,
	},
	"pkcs11": {
		what: "the PKCS #11 token", example: "pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=LABEL",
		// RFC 7512 §2.3.
		attributes: []string{"module-path", "token", "serial", "slot-id", "max-sessions"}, check: checkPKCS11,
	},
	"tpmkms": {
		"the TPM", "tpmkms:device=/dev/tpmrm0", []string{"device", "storage-directory"},
		func(attributes) error { return nil }, openTPM,
	},
	"transit": {
		"the transit engine", "transit:address=https://HOST:8200;mount=transit",
		[]string{"address", "mount", "namespace", "token-file", "ca-file"}, checkTransit, openTransit,
	},
}

// Schemes returns the schemes of URIs that [Check] takes, sorted.
func Schemes() []string { return slices.Sorted(maps.Keys(schemes)) }

// Check says what is wrong with the URI of a key manager, without opening it: its
// scheme is one of [Schemes], and what follows are attributes, name=value, with
// semicolons between them. It names no key and has no secret.
func Check(raw string) error {
	_, _, err := parse(raw)
	return err
}

func parse(raw string) (scheme, attributes, error) {
	fail := func(err error) (scheme, attributes, error) { return scheme{}, nil, err }
	if raw == "" {
		return fail(fmt.Errorf("there is no uri; write %s, or one with %s", schemes["pkcs11"].example, strings.Join(Schemes(), ", ")))
	}
	u, err := uri.Parse(raw)
	if err != nil { // the error would show the URI, and so a PIN
		return fail(fmt.Errorf("uri is no URI of a key manager; write one like %s", schemes["pkcs11"].example))
	}
	name := strings.ToLower(u.Scheme)
	s, ok := schemes[name]
	if !ok {
		if near := config.Nearest(name, Schemes()); near != "" {
			return fail(fmt.Errorf("uri has the scheme %q, which is not supported; did you mean %s?", u.Scheme, schemes[near].example))
		}
		return fail(fmt.Errorf("uri has the scheme %q, which is not supported; it is one of %s", u.Scheme, strings.Join(Schemes(), ", ")))
	}
	said := make(attributes)
	for name, values := range uri.Values(u) {
		switch {
		case name == "pin-value" || name == "pin-source" || name == "pin-prompt":
			return fail(fmt.Errorf("uri has %s; write the PIN to a file and set pin_file to its path", name))
		case slices.Contains([]string{"token", "secret", "password", "access-key", "secret-key", "client-secret"}, name) && !slices.Contains(s.attributes, name):
			return fail(fmt.Errorf("uri has %s; secrets are not in it, see docs/authorities.md for where %s takes them from", name, s.what))
		case slices.Contains([]string{"id", "object", "name", "key-id", "alias"}, name):
			return fail(fmt.Errorf("uri has %s, which names a key; the server names its keys itself", name))
		case !slices.Contains(s.attributes, name):
			hint := ""
			if near := config.Nearest(name, s.attributes); near != "" {
				hint = fmt.Sprintf(" (did you mean %s?)", near)
			}
			return fail(fmt.Errorf("uri has %s; it may have %s%s", name, strings.Join(s.attributes, ", "), hint))
		case len(values) != 1 || values[0] == "":
			return fail(fmt.Errorf("uri has no value of %s, or more than one; write one", name))
		}
		said[name] = values[0]
	}
	if err := s.check(said); err != nil {
		return fail(err)
	}
	return s, said, nil
}

func checkPKCS11(u attributes) error {
	tokens := 0
	for _, name := range []string{"token", "serial", "slot-id"} {
		if u[name] != "" {
			tokens++
		}
	}
	if tokens != 1 {
		return errors.New("uri names no token, or more than one; have one of token, serial and slot-id in it")
	}
	return errPKCS11
}

// checkEndpoint checks the URL of what takes the place of a cloud's service.
func checkEndpoint(u attributes) (err error) {
	if u["endpoint"] != "" {
		u["endpoint"], err = cloud.CheckEndpoint(u["endpoint"])
	}
	if err != nil {
		return fmt.Errorf("uri has the endpoint %w", err)
	}
	return nil
}

// Open returns a key manager that keeps its keys where a URI says. It also
// implements [apiv1.KeyDeleter] and [apiv1.NameValidator], and has a method
// Available, which says why it cannot be used now, and has another look taken;
// then its error, and that of what it is asked for, is [ErrUnavailable]. All but
// that of PKCS #11 have a method Keys, which lists the server's keys.
func Open(o Options) (apiv1.KeyManager, error) {
	s, said, err := parse(o.URI)
	if err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if s.open == nil {
		return newPKCS11Keys(o)
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	svc, err := s.open(ctx, o, said)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", s.what, err)
	}
	o.Log.Info("keys are in a key service", "service", s.what, "owner", o.owner().id(), "prefix", o.owner().prefix())
	return newManager(s.what, svc, o.Log), nil
}

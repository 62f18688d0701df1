package authority

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/uri"
)

// ErrKeysUnavailable says that the key manager has the keys but cannot be
// reached or does not sign. Try again.
var ErrKeysUnavailable = errors.New("the keys of the authorities cannot be used now; try again")

// KMSOptions say where [NewKMSKeys] keeps keys.
type KMSOptions struct {
	URI         string               // see [CheckKMS]
	PIN         string               // of a PKCS #11 token; empty: it needs none
	TrustDomain spiffeid.TrustDomain // part of the keys' labels
	Log         *slog.Logger         // nil: none
}

// pkcs11Attributes are what the URI of a PKCS #11 token may have. RFC 7512
// §2.3.
var pkcs11Attributes = []string{"module-path", "token", "serial", "slot-id", "max-sessions"}

// CheckKMS says what is wrong with the URI of a key manager. It is
// pkcs11:module-path=LIBRARY;token=LABEL, or has serial or slot-id instead of
// token (RFC 7512), and names no key and no PIN.
func CheckKMS(raw string) error {
	const example = "write pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=LABEL"
	if raw == "" {
		return errors.New("there is no uri; " + example)
	}
	u, err := uri.Parse(raw)
	if err != nil { // the error would show the URI, and so a PIN
		return errors.New("uri is no URI of a key manager; " + example)
	}
	if !strings.EqualFold(u.Scheme, string(apiv1.PKCS11)) {
		return fmt.Errorf("uri has the scheme %q, which is not supported; %s", u.Scheme, example)
	}
	tokens := 0
	for name, values := range uri.Values(u) {
		switch {
		case name == "pin-value" || name == "pin-source" || name == "pin-prompt":
			return fmt.Errorf("uri has %s; write the PIN to a file and set pin_file to its path", name)
		case name == "id" || name == "object":
			return fmt.Errorf("uri has %s, which names a key; the server names its keys itself", name)
		case !slices.Contains(pkcs11Attributes, name):
			return fmt.Errorf("uri has %s; it may have %s", name, strings.Join(pkcs11Attributes, ", "))
		case len(values) != 1 || values[0] == "":
			return fmt.Errorf("uri has no value of %s, or more than one; write one", name)
		case name == "token" || name == "serial" || name == "slot-id":
			tokens++
		}
	}
	if tokens != 1 {
		return errors.New("uri names no token, or more than one; have one of token, serial and slot-id in it")
	}
	return errPKCS11
}

// NewKMSKeys returns a key manager that keeps its keys where a URI says, from
// where they do not come out. It also implements [apiv1.KeyDeleter] and
// [apiv1.NameValidator], and has a method Available, which says why it cannot
// be used now, and tries again to use it; then its error, and that of what it
// is asked for, is [ErrKeysUnavailable].
func NewKMSKeys(o KMSOptions) (apiv1.KeyManager, error) {
	if err := CheckKMS(o.URI); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return newPKCS11Keys(o)
}

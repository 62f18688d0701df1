package authority_test

import (
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/server/authority"
)

func TestURIsOfKeyManagersThatCannotBeMeantAreRefused(t *testing.T) {
	for uri, want := range map[string]string{
		"":                                "no uri",
		"%zz":                             "no URI",
		"softhsm":                         "no URI",
		"awskms:region=us-east-2":         `scheme "awskms", which is not supported`,
		"pkcs11:":                         "names no token",
		"pkcs11:module-path=/x.so":        "names no token",
		"pkcs11:token=a;serial=1":         "more than one",
		"pkcs11:token=a;token=b":          "more than one",
		"pkcs11:token=":                   "no value of token",
		"pkcs11:token=a;tokn=b":           "has tokn; it may have module-path, token",
		"pkcs11:token=a;object=k":         "names its keys itself",
		"pkcs11:token=a?pin-value=8765":   "pin_file",
		"pkcs11:token=a;pin-value=8765":   "pin_file",
		"pkcs11:token=a?pin-source=/8765": "pin_file",
	} {
		err := authority.CheckKMS(uri)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got error %v, want one with %q", uri, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "8765") {
			t.Errorf("%q: the error %q shows the PIN", uri, err)
		}
	}
}

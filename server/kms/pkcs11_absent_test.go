//go:build !(pkcs11 && cgo)

package kms_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/server/kms"
)

func TestAProgramWithoutPKCS11SaysSo(t *testing.T) {
	const uri = "pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=hallmark"
	err := kms.Check(uri)
	if err == nil || !strings.Contains(err.Error(), "built without PKCS #11") || !strings.Contains(err.Error(), "make build-pkcs11") {
		t.Errorf("it says %v", err)
	}
	_, err = kms.Open(kms.Options{URI: uri, TrustDomain: spiffeid.RequireTrustDomainFromString("example.org"), Server: "a"})
	if err == nil || !strings.Contains(err.Error(), "built without PKCS #11") {
		t.Errorf("it says %v", err)
	}
}

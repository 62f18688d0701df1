//go:build !(pkcs11 && cgo)

package authority_test

import (
	"testing"

	"github.com/hallmark-id/hallmark/server/authority"
)

func TestAProgramWithoutPKCS11SaysSo(t *testing.T) {
	const uri = "pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=hallmark"
	expectError(t, authority.CheckKMS(uri), "built without PKCS #11", "make build-pkcs11")
	_, err := authority.NewKMSKeys(authority.KMSOptions{URI: uri, TrustDomain: td})
	expectError(t, err, "built without PKCS #11")
}
